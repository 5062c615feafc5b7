"""EWGS: LSQ in all but the gradient of x."""

from typing import Any

import pytest
import torch

from qat.errors import SpecError
from qat.fake_quant import make_fake_quant
from qat.quantizers import EWGS, LSQ
from qat.spec import QuantSpec


def run(quantizer, x) -> Any:
    """Return the output and the gradients of x and scale, for one upstream gradient."""
    x = x.clone().requires_grad_()
    quantizer.set_range(torch.full((3, 1), -1.0), torch.full((3, 1), 0.7))
    y = quantizer(x)
    y.backward(torch.linspace(-1, 1, x.numel()).view_as(x))
    return y, x.grad, quantizer.learned_scale.grad


@pytest.mark.parametrize("spec", [QuantSpec(4, axis=0), QuantSpec(2, True, False, 0)], ids=str)
def test_only_the_gradient_of_x_differs_from_lsq_and_by_delta(spec):
    x = torch.randn(3, 50)
    y, grad, scale_grad = run(EWGS(spec, (3, 1), has_batch=False, delta=0.5), x)
    expected = run(LSQ(spec, (3, 1), has_batch=False), x)
    assert torch.equal(y, expected[0])
    assert torch.equal(scale_grad, expected[2])
    factor = 1 + 0.5 * grad.sign() * (x - y).detach() / run_width(spec)
    # Distances here come from real values, there from steps.
    torch.testing.assert_close(grad, expected[1] * factor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(grad, expected[1])


def run_width(spec):
    """Return the real width of the grid that ``run`` sets."""
    quantizer = LSQ(spec, (3, 1), has_batch=False)
    quantizer.set_range(torch.full((3, 1), -1.0), torch.full((3, 1), 0.7))
    return quantizer.scale.detach() * (spec.qmax - spec.qmin)


def test_delta_is_an_option_of_the_recipe():
    parts: Any = {"quantizer": "ewgs", "observer": "min_max", "has_batch": True}
    fake_quant = make_fake_quant("relu", QuantSpec(4), (4, 10), options={"delta": 0.25}, **parts)
    assert isinstance(fake_quant.quantizer, EWGS)
    assert fake_quant.quantizer.delta == 0.25
    with pytest.raises(SpecError, match=r"site 'relu': expected delta of EWGS .* got -1"):
        make_fake_quant("relu", QuantSpec(4), (4, 10), options={"delta": -1}, **parts)
