"""DoReFa: odd codes, and gradients through tanh and its largest value."""

import numpy as np
import pytest
import torch
from torch import nn

from qat.errors import SpecError
from qat.fake_quant import Phase, make_fake_quant
from qat.functional.affine import dequantize
from qat.graph.convert import convert
from qat.layers import quantized_layers
from qat.quantizers import DoReFa
from qat.spec import QuantSpec
from tests.helpers import folded, make_scheme, warm_up

AXES = [None, 0]


def make(bits, axis, rows=3, width=2.0):
    spec = QuantSpec(bits, axis=axis)
    quantizer = DoReFa(spec, spec.scale_shape((rows, 50)), has_batch=False)
    reach = torch.full_like(quantizer.scale, width)
    quantizer.set_range(-reach, reach)
    return quantizer


def formula(w, bits, axis):
    """The paper's two lines, in float64: quantize_k of tanh over its largest, back to -1..1."""
    t = np.tanh(w)
    top = np.abs(t).max(axis=None if axis is None else 1, keepdims=True)
    steps = 2**bits - 1
    return 2 * np.rint((t / (2 * top) + 0.5) * steps) / steps - 1


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_is_the_formula_and_codes_are_odd(bits, axis):
    quantizer, w = make(bits, axis), torch.randn(3, 50)
    codes, top = quantizer.codes(w), 2**bits - 1
    expected = formula(w.numpy().astype(np.float64), bits, axis)
    assert np.array_equal(codes.numpy(), np.rint(expected * top))
    assert torch.equal(codes.remainder(2), torch.ones_like(codes))
    assert codes.abs().max() == top == quantizer.code_spec.qmax
    assert quantizer.code_spec.qmin == -top
    assert torch.equal(quantizer(w), dequantize(codes, quantizer.scale, quantizer.zero_point))
    # 2 / top is no float32, and is multiplied by the code.
    np.testing.assert_allclose(quantizer(w).numpy(), 2 * expected, rtol=3e-7)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_code_appears_and_ties_go_to_the_even_step(bits):
    """tanh of these is exactly spaced in float64; 0 lies between the codes -1 and 1."""
    top = 2**bits - 1
    w = torch.atanh(torch.arange(-top, top + 1, 2).double() / (2 * top)).float().view(1, -1)
    quantizer = make(bits, None)
    assert quantizer.codes(w).tolist() == [list(range(-top, top + 1, 2))]
    middle = quantizer.codes(torch.tensor([[0.0, 1.0]]))[0, 0]
    assert ((middle + top) / 2) % 2 == 0


@pytest.mark.parametrize("axis", AXES)
def test_gradient_goes_through_tanh_and_its_largest_value(axis):
    """d/dw_i of S * t_i / t_m, t_m the largest: S (1 - t_i^2) / t_m, and S sum(g t) less at m."""
    quantizer, w = make(4, axis), torch.randn(3, 50, requires_grad=True)
    upstream = torch.randn(3, 50)
    quantizer(w).backward(upstream)
    assert w.grad is not None
    t, g = np.tanh(w.detach().double().numpy()), upstream.double().numpy()
    rows = [slice(0, 3)] if axis is None else [slice(i, i + 1) for i in range(3)]
    expected = np.zeros((3, 50))
    for row in rows:
        m = np.unravel_index(np.abs(t[row]).argmax(), t[row].shape)
        largest = abs(t[row][m])
        part = 2 * g[row] * (1 - t[row] ** 2) / largest
        pull = (2 * g[row] * t[row]).sum() / largest**2
        part[m] -= pull * np.sign(t[row][m]) * (1 - t[row][m] ** 2)
        expected[row] = part
    np.testing.assert_allclose(w.grad.numpy(), expected, rtol=1e-4, atol=1e-5)  # float32 sums


def test_all_zero_weights_stay_finite():
    quantizer, w = make(4, 0), torch.zeros(3, 50, requires_grad=True)
    quantizer(w).sum().backward()
    assert quantizer(w).isfinite().all()
    assert w.grad is not None
    assert w.grad.isfinite().all()


def test_pretrained_weights_are_a_good_start_and_the_scale_stays():
    fake_quant = make_fake_quant(
        "w", QuantSpec(8, axis=0), (3, 50), quantizer="dorefa", observer="min_max", has_batch=False
    )
    fake_quant.set_phase(Phase.OBSERVE)
    w = torch.randn(3, 50) * 0.05
    fake_quant(w)
    fake_quant.finish_calibration()
    fake_quant.set_phase(Phase.QUANTIZE)
    scale = fake_quant.quantizer.scale.clone()
    # tanh bends 0.15 by 0.7 percent, and half a step is 0.4 percent of the largest.
    torch.testing.assert_close(fake_quant(w), w, atol=0.002, rtol=0.01)
    fake_quant(w * 3)
    assert torch.equal(fake_quant.quantizer.scale, scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("batch_norm", ["late", "folded"])
def test_what_is_trained_is_what_is_deployed(batch_norm, bits):
    """Negative gains of the batch-norm turn the codes' signs; the integers are the fold stage."""
    x = torch.randn(8, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm := nn.BatchNorm2d(6), nn.ReLU())
    warm_up(model, x)
    nn.init.constant_(norm.weight[0], -0.7)
    scheme = make_scheme(bits, batch_norm=batch_norm, weight={"quantizer": "dorefa"})
    captured, _ = folded(model, scheme, x)
    ((_, layer),) = quantized_layers(captured)
    codes = layer.integers().weight / layer.spec.storage_gain
    assert (codes % 2 == 1).all()
    assert torch.equal(codes[0].sign(), -layer.raw_weight[0].sign())
    assert torch.equal(codes[1].sign(), layer.raw_weight[1].sign())
    torch.testing.assert_close(convert(captured)(x), captured(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "has_batch"),
    [
        (QuantSpec(4), True),
        (QuantSpec(1), False),
        (QuantSpec(16), False),
        (QuantSpec(4, signed=False), False),
        (QuantSpec(4, symmetric=False), False),
    ],
)
def test_other_sites_are_refused(spec, has_batch):
    with pytest.raises(SpecError, match="DoReFa on signed, symmetric weights of 2 to 15 bits"):
        DoReFa(spec, (), has_batch=has_batch)
