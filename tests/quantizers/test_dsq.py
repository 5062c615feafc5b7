"""DSQ: soft and with the staircase's gradients at first, LSQ to the bit at last."""

from typing import Any

import pytest
import torch

from qat.errors import SpecError
from qat.functional.staircase import staircase
from qat.quantizers import DSQ, LSQ
from qat.spec import QuantSpec

SPECS = [
    QuantSpec(2),
    QuantSpec(4, axis=0),
    QuantSpec(4, signed=False, symmetric=False),
    QuantSpec(4, axis=0, group_size=10),
]


def make(kind, spec, **options):
    shape = spec.scale_shape((3, 40))
    quantizer = kind(spec, shape, has_batch=False, **options)
    quantizer.set_range(torch.full(shape, -0.9), torch.full(shape, 0.7))
    return quantizer


def outcome(quantizer, x) -> Any:
    """Return output and gradients of x and scale, for one upstream gradient."""
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(torch.linspace(-1, 1, x.numel()).view_as(x))
    return y.detach(), x.grad, quantizer.learned_scale.grad


@pytest.mark.parametrize("training", [True, False], ids=["sharp", "eval"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sharp_or_in_eval_mode_it_is_hard_rounding_to_the_bit(spec, training):
    x = torch.randn(3, 40)
    quantizer = make(DSQ, spec).train(training)
    quantizer.anneal(0.8 if training else 0.0)
    for a, b in zip(outcome(quantizer, x), outcome(make(LSQ, spec), x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("progress", [0.0, 0.4, 0.7])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_soft_gradients_are_the_staircases_in_each_region(spec, progress):
    """y = s f(x / s): dy/dx = f', dy/ds = f - v f' inside, the clipping end of the grid outside."""
    x, quantizer = torch.randn(3, 40), make(DSQ, spec, start=0.3)
    quantizer.anneal(progress)
    softness = torch.tensor(0.3 * (1 - progress / 0.8))
    y, grad, scale_grad = outcome(quantizer, x)
    blocks = (3, 4, 10) if spec.group_size else (3, 1, 40) if spec.axis == 0 else (1, 1, 120)
    scale, zero = (
        t.detach().reshape(blocks[0], blocks[1], 1) for t in (quantizer.scale, quantizer.zero_point)
    )
    v = (x.reshape(blocks) / scale).requires_grad_()
    f = staircase(v, softness)
    (slope,) = torch.autograd.grad(f.sum(), v)
    low, high, v, f = spec.qmin - zero, spec.qmax - zero, v.detach(), f.detach()
    inside = (v >= low) & (v <= high)
    assert inside.any()
    assert (v < low).any()
    assert (v > high).any()
    ends = torch.where(v < low, low, high)
    g = torch.linspace(-1, 1, 120).view(blocks)
    torch.testing.assert_close(y, (scale * torch.where(inside, f, ends)).view(3, 40))
    torch.testing.assert_close(grad, (g * slope * inside).view(3, 40))
    total = g * torch.where(inside, f - v * slope, ends)
    total = total.sum(2) if spec.axis == 0 else total.sum()
    factor = (blocks[2] * spec.qmax) ** -0.5
    # Sums of up to 120 numbers, in another order.
    torch.testing.assert_close(scale_grad, total * factor, rtol=1e-4, atol=1e-5)
    assert not torch.equal(y, make(LSQ, spec)(x))


def test_softness_falls_to_0_and_is_saved():
    quantizer = make(DSQ, SPECS[0], start=0.4, sharp=0.5)
    seen = []
    for progress in (0.0, 0.25, 0.375, 0.5, 1.0):
        quantizer.anneal(progress)
        seen.append(float(quantizer.softness))
    assert seen == pytest.approx([0.4, 0.2, 0.1, 0.0, 0.0])
    assert seen[3:] == [0.0, 0.0]
    quantizer.anneal(0.25)
    fresh, x = DSQ(SPECS[0], (), has_batch=False), torch.randn(3, 40)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(x), quantizer(x))


def test_gradients_stay_finite_however_soft_it_is():
    quantizer = make(DSQ, SPECS[0])
    for progress in (0.0, 0.799999, 0.8, 1.0):
        quantizer.zero_grad()
        quantizer.anneal(progress)
        for value in outcome(quantizer, torch.randn(3, 40) * 3):
            assert value.isfinite().all()


@pytest.mark.parametrize("options", [{"start": 0.0}, {"start": 1.0}, {"sharp": 0.0}, {"sharp": 2}])
def test_options_out_of_range(options):
    with pytest.raises(SpecError, match="for DSQ, got"):
        make(DSQ, SPECS[0], **options)
