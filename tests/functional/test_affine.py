"""Integer grids: every code comes back, every gradient is the paper's, nothing wraps."""

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from qat.functional.affine import (
    MAX_BIAS_CODE,
    MIN_SCALE,
    dequantize,
    expand,
    fake_quantize_bias,
    mean_to,
    quantize,
    quantize_bias,
    reduce_to,
    scale_from_range,
)
from qat.functional.fake_quantize import fake_quantize
from qat.spec import QuantSpec

FORMS = {
    "unsigned": {"signed": False},
    "signed": {},
    "narrow": {"narrow": True},
    "affine": {"signed": False, "symmetric": False},
    "affine-signed": {"symmetric": False},
}
GRIDS: list[Any] = [
    pytest.param(QuantSpec(bits, **form), id=f"{name}{bits}")
    for bits, (name, form) in product(range(2, 9), FORMS.items())
]
LAYOUTS = ["tensor", "axis0", "axis1", "group"]


def lay_out(line, layout):
    """Return a tensor whose every block of one scale is ``line``, and the shape of that scale."""
    size = len(line)
    if layout == "tensor":
        return line.clone(), ()
    if layout == "axis0":
        return line.expand(3, size).clone(), (3, 1)
    if layout == "axis1":
        return line[:, None].expand(size, 3).clone(), (1, 3)
    return line.repeat(3, 2), (3, 2)


def spread(values, layout, shape):
    """Numpy's own way from one value per block to one value per element."""
    values = np.asarray(values)
    if layout == "group":
        return np.repeat(values, shape[1] // 2, axis=1)
    return np.broadcast_to(values, shape)


def parameters(spec, scale_shape, *, dyadic=False):
    """Draw a scale, and a zero point over the whole grid; powers of two keep sums exact."""
    scale = torch.rand(scale_shape) * 4 - 3
    scale = torch.exp2(scale.round() if dyadic else scale * 3)
    zero_point = torch.zeros(scale_shape)
    if not spec.symmetric:
        choices = torch.tensor([spec.qmin, spec.qmax, (spec.qmin + spec.qmax) // 2]).float()
        zero_point = choices[torch.randint(3, scale_shape)]
    return scale, zero_point


def onnx_quantize(x, scale, zero_point, spec):
    """ONNX QuantizeLinear: saturate(round_half_even(x / y_scale) + y_zero_point), float32."""
    return np.clip(np.rint(x / scale) + zero_point, spec.qmin, spec.qmax)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", GRIDS)
def test_every_code_comes_back_and_what_is_beyond_saturates(spec, layout):
    line = torch.arange(spec.qmin - 2, spec.qmax + 3).float()
    codes, scale_shape = lay_out(line, layout)
    scale, zero_point = parameters(spec, scale_shape)
    real = dequantize(codes, scale, zero_point)
    back = quantize(real, scale, zero_point, spec.qmin, spec.qmax)
    assert torch.equal(back, codes.clamp(spec.qmin, spec.qmax))
    steps = codes.numpy() - spread(zero_point, layout, codes.shape)
    assert np.array_equal(real.numpy(), steps * spread(scale, layout, codes.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", GRIDS)
def test_forward_is_quantize_dequantize_of_onnx_bit_for_bit(spec, layout):
    line = torch.linspace(-1.3, 1.3, 97) * (spec.qmax - spec.qmin)
    x, scale_shape = lay_out(line, layout)
    scale, zero_point = parameters(spec, scale_shape)
    x = x * expand(scale, x.shape) * 1.01
    result = fake_quantize(x, scale, zero_point, spec)
    codes = quantize(x, scale, zero_point, spec.qmin, spec.qmax)
    assert torch.equal(result, dequantize(codes, scale, zero_point))
    s, z = spread(scale, layout, x.shape), spread(zero_point, layout, x.shape)
    onnx_codes = onnx_quantize(x.numpy(), s, z, spec)
    assert np.array_equal(codes.numpy(), onnx_codes)
    assert np.array_equal(result.numpy(), (onnx_codes - z) * s)


def test_ties_go_to_the_even_code():
    spec = QuantSpec(8)
    whole = torch.arange(spec.qmin, spec.qmax).float()
    scale = torch.tensor(0.25)
    codes = quantize((whole + 0.5) * scale, scale, torch.zeros(()), spec.qmin, spec.qmax)
    assert torch.equal((codes - whole - 0.5).abs(), torch.full_like(whole, 0.5))
    assert torch.equal(codes % 2, torch.zeros_like(whole))


def test_division_is_a_division():
    """The product with the reciprocal moves some floats across a tie; the quotient does not."""
    scale = np.float32(0.7)
    x = (np.arange(-128, 127, dtype=np.float32) + np.float32(0.5)) * scale
    divided, multiplied = np.rint(x / scale), np.rint(x * (np.float32(1) / scale))
    assert (divided != multiplied).any()
    codes = quantize(torch.tensor(x), torch.tensor(scale), torch.zeros(()), -128, 127)
    assert np.array_equal(codes.numpy(), divided)


def equation_3(x, scale, zero_point, spec):
    """LSQ eq. 3, one element at a time; both ends of the grid count as inside."""
    result = np.empty_like(x)
    for index, value in np.ndenumerate(x):
        v = value / scale[index]
        lowest, highest = spec.qmin - zero_point[index], spec.qmax - zero_point[index]
        if v < lowest:
            result[index] = lowest
        elif v > highest:
            result[index] = highest
        else:
            result[index] = np.rint(v) - v
    return result


def sum_blocks(x, layout):
    """Add up the elements that share one scale."""
    if layout == "tensor":
        return x.sum()
    if layout == "axis0":
        return x.sum(1, keepdims=True)
    if layout == "axis1":
        return x.sum(0, keepdims=True)
    return x.reshape(3, 2, -1).sum(2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [g for g in GRIDS if g.values[0].bits in (2, 3, 8)])
def test_gradients_are_equation_3_exactly(spec, layout):
    """Eighths of a step from far below to far above: clipped, inside, both ends, every tie.

    All numbers are small dyadic fractions, so sums of any order are exact: no tolerance.
    """
    line = torch.arange(8 * (spec.qmin - spec.qmax - 2), 8 * (spec.qmax - spec.qmin + 2) + 1) / 8
    steps, scale_shape = lay_out(line, layout)
    scale, zero_point = parameters(spec, scale_shape, dyadic=True)
    s, z = spread(scale, layout, steps.shape), spread(zero_point, layout, steps.shape)
    x = (steps * torch.tensor(s)).requires_grad_()
    scale.requires_grad_()
    upstream = torch.randint(-1, 2, x.shape).float()
    fake_quantize(x, scale, zero_point, spec, factor=0.25).backward(upstream)
    assert x.grad is not None
    assert scale.grad is not None
    v, g = steps.numpy().astype(np.float64), upstream.numpy().astype(np.float64)
    inside = (v >= spec.qmin - z) & (v <= spec.qmax - z)
    assert np.array_equal(x.grad.numpy(), g * inside)
    slope = equation_3(x.detach().numpy().astype(np.float64), s, z, spec)
    assert np.array_equal(scale.grad.numpy(), 0.25 * sum_blocks(g * slope, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_floats_are_quantized_in_float32(dtype):
    spec, scale, zero = QuantSpec(8), torch.tensor(0.0371, requires_grad=True), torch.zeros(())
    x = torch.linspace(-6, 6, 4001).to(dtype).requires_grad_()
    result = fake_quantize(x, scale, zero, spec)
    assert result.dtype is dtype
    exact = fake_quantize(x.detach().float(), scale.detach(), zero, spec)
    assert torch.equal(result, exact.to(dtype))
    low = scale.detach().to(dtype)
    assert not torch.equal(result, (x.detach() / low).round().clamp(-128, 127) * low)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is dtype
    assert scale.grad is not None
    assert scale.grad.dtype is torch.float32


@pytest.mark.parametrize("bits", range(2, 17))
def test_codes_over_eight_bits_come_back_as_float32(bits):
    x = torch.linspace(-1, 1, 2**bits + 1).bfloat16()
    one = torch.tensor(2.0**-bits)
    result = fake_quantize(x, one, one * 0, QuantSpec(bits))
    assert result.dtype is (torch.bfloat16 if bits <= 8 else torch.float32)


def test_autocast_changes_nothing():
    spec, x = QuantSpec(8, axis=0), torch.randn(4, 50)
    runs = []
    for enabled in (False, True):
        inputs = x.clone().requires_grad_()
        scale = torch.full((4, 1), 0.013, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = fake_quantize(inputs, scale, torch.zeros(4, 1), spec)
        result.square().sum().backward()
        runs.append((result, inputs.grad, scale.grad))
    assert runs[1][0].dtype is torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 6, 1), (4, 3, 1), (2, 6, 1), (4, 6, 2)])
def test_reduce_to_is_the_adjoint_of_expand(shape):
    """<expand(s), x> = <s, reduce_to(x)>, in whole numbers, hence exactly."""
    x = torch.randint(-9, 10, (4, 6, 2)).float()
    scale = torch.randint(-9, 10, shape).float()
    reduced = reduce_to(x, scale.shape)
    assert reduced.shape == scale.shape
    assert (expand(scale, x.shape) * x).sum() == (scale * reduced).sum()


@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 6, 1), (4, 2, 1)], ids=str)
def test_mean_to_averages_the_elements_of_each_scale(shape):
    whole = torch.randint(-8, 8, (4, 6, 4)).float()
    for index in range(torch.Size(shape).numel()):
        marker = torch.zeros(torch.Size(shape).numel())
        marker[index] = 1
        mask = expand(marker.view(shape), whole.shape).expand_as(whole) == 1
        found = mean_to(whole, torch.Size(shape)).flatten()[index]
        assert found == whole[mask].mean()  # sums of whole numbers, one division: exact


RANGES = [(-1.0, 1.0), (-0.3, 7.0), (-7.0, 0.1), (0.0, 5.0), (2.0, 5.0), (-5.0, 0.0), (-5.0, -2.0)]


def ranges():
    """Ranges on every side of zero and of every size, among them 1000 drawn ones."""
    fixed = torch.tensor([(low * s, high * s) for low, high in RANGES for s in (1e-4, 1.0, 1e30)])
    drawn = torch.randn(1000, 2).sort(dim=1).values
    return torch.cat([fixed, drawn]).unbind(1)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_range_is_covered_zero_is_exact_and_the_scale_is_the_finest(bits, name, power_of_two):
    spec = QuantSpec(bits, power_of_two=power_of_two, axis=0, **FORMS[name])
    low, high = ranges()
    scale, zero_point = scale_from_range(low, high, spec)
    assert (scale > 0).all()
    assert torch.equal(zero_point, zero_point.round().clamp(spec.qmin, spec.qmax))
    zero = torch.zeros_like(low)
    codes = quantize(zero, scale, zero_point, spec.qmin, spec.qmax)
    assert torch.equal(dequantize(codes, scale, zero_point), zero)
    if not spec.signed and spec.symmetric:
        low, high = low.clamp(min=0), high.clamp(min=0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    lowest, highest = spec.qmin - zero_point, spec.qmax - zero_point
    # A whole zero point moves both ends by up to half a step; float32 adds an ulp of the code.
    slack = 0 if spec.symmetric else 0.5 + 2 * 2.0 ** (bits - 24)
    assert (low / scale >= lowest - slack).all()
    assert (high / scale <= highest + slack).all()
    # Finest: a scale smaller by an ulp or two (by half, for powers of two) would not cover it.
    reach = high / spec.qmax
    if not spec.symmetric:
        reach = (high - low) / (spec.qmax - spec.qmin)
    elif spec.signed:
        reach = torch.maximum(reach, low / spec.qmin)
    if power_of_two:
        assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
        assert ((scale == MIN_SCALE) | (scale / 2 < reach)).all()
    else:
        assert ((scale == MIN_SCALE) | (scale <= reach * (1 + 2.0**-22))).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_dead_range_gives_the_smallest_scale(name, power_of_two):
    spec = QuantSpec(8, power_of_two=power_of_two, **FORMS[name])
    scale, zero_point = scale_from_range(torch.zeros(()), torch.zeros(()), spec)
    assert scale == MIN_SCALE
    assert fake_quantize(torch.zeros(3), scale, zero_point, spec).abs().sum() == 0


def test_bias_codes_are_exact_up_to_the_bound():
    """Against rational arithmetic; float32 would lose the last bits of codes over 2**24."""
    scale = torch.rand(2000) * 1e-6 + 1e-9
    bias = (torch.rand(2000) * 2 - 1) * scale * torch.exp2(torch.rand(2000) * 30)
    codes = quantize_bias(bias, scale)
    pairs = zip(bias.tolist(), scale.tolist(), strict=True)
    exact = [round(Fraction(b) / Fraction(s)) for b, s in pairs]
    assert max(map(abs, exact)) > 2**25
    assert codes.dtype is torch.int32
    assert codes.tolist() == exact


def test_bias_codes_do_not_wrap():
    scale = torch.tensor(2.0**-20)
    ends = torch.tensor([2.0**31, -(2.0**31), 2.0**31 + 256, 1e30, -1e30, 2.0**40]) * scale
    expected = torch.tensor([1, -1, 1, 1, -1, 1]) * MAX_BIAS_CODE
    assert torch.equal(quantize_bias(ends, scale), expected.to(torch.int32))


def test_bias_lies_on_its_grid_and_keeps_its_gradient():
    scale = torch.tensor([0.5, 0.25, 0.125])
    bias = torch.tensor([0.8, -0.8, 0.0625], requires_grad=True)
    result = fake_quantize_bias(bias, scale)
    result.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(result, torch.tensor([1.0, -0.75, 0.0]))
    assert torch.equal(bias.grad, torch.tensor([1.0, 2.0, 3.0]))
