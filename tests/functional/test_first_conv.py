"""The first convolution with the fake-quant of its input: gradients against those of the parts."""

import pytest
import torch
from torch.nn import functional as F

from qat.functional import fused
from qat.functional.affine import dequantize, quantize
from qat.functional.convolution import Convolution
from qat.functional.first_conv import first_conv, suits
from qat.functional.fused import Grid, fused_kernels

CASES = {
    "plain": ((4, 3, 9, 9), (8, 3, 3, 3), Convolution([1, 1], [1, 1], [1, 1])),
    "strided": ((4, 3, 16, 16), (8, 3, 7, 7), Convolution([2, 2], [3, 3], [1, 1])),
    "patches": ((2, 3, 16, 16), (12, 3, 8, 8), Convolution([8, 8], [0, 0], [1, 1])),
    "dilated": ((2, 4, 11, 10), (6, 4, 3, 2), Convolution([1, 2], [2, 0], [2, 1])),
}


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)


def slopes(x, scale, zero, low, high):
    """LSQ's derivative of a value on the grid by the scale, written out; float64."""
    steps, ends = x.double() / scale.double(), (low - zero.double(), high - zero.double())
    inside = (steps >= ends[0]) & (steps <= ends[1])
    return torch.where(inside, steps.round() - steps, steps.round().clamp(*ends))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_parts(case, has_bias, memory):
    torch.manual_seed(0)
    shape, weight_shape, convolution = CASES[case]
    x = torch.randn(shape)
    weight = torch.randn(weight_shape).to(memory_format=memory).requires_grad_()
    bias = torch.randn(weight_shape[0], requires_grad=True) if has_bias else None
    scale, zero = torch.tensor(0.03), torch.tensor(5.0)
    learned = scale.clone().requires_grad_()  # clips at both ends: -133..122 steps of 0.03
    grid = Grid(scale, zero, -128, 127, 0.5, learned=learned)
    with fused_kernels():
        assert suits(x, grid)
        y = first_conv(x, weight, bias, grid, convolution)
    upstream = torch.randn_like(y)
    wanted = [weight, learned, *([] if bias is None else [bias])]
    found = [g.double() for g in torch.autograd.grad(y, wanted, upstream)]

    snapped = dequantize(quantize(x, scale, zero, -128, 127), scale, zero)
    exact = snapped.double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    b = None if bias is None else bias.detach().double().requires_grad_()
    expected = F.conv2d(exact, w, b, *convolution)
    of_x, *others = torch.autograd.grad(
        expected, [exact, w, *([] if b is None else [b])], upstream.double()
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close([found[0], *found[2:]], others, rtol=1e-4, atol=1e-3)
    terms = 0.5 * of_x * slopes(x, scale, zero, -128, 127)
    # float32 sums of as many terms of this size: 1e-6 of the sum of their magnitudes
    assert abs(found[1].item() - terms.sum().item()) < 1e-6 * terms.abs().sum().item()


def test_what_is_no_gain_is_left_to_the_parts():
    x, learned = torch.randn(2, 3, 8, 8), torch.tensor(0.1, requires_grad=True)
    grid = Grid(torch.tensor(0.1), torch.tensor(0.0), -8, 7, learned=learned)
    assert not suits(x, grid)  # kernels are switched off
    with fused_kernels():
        assert suits(x, grid)
        assert not suits(x.clone().requires_grad_(), grid)
        assert not suits(x, grid._replace(learned=None))
        assert suits(x, grid._replace(learned=torch.tensor(0.1)))  # frozen: sums in the same order
        assert not suits(x.bfloat16(), grid)
        assert not suits(x[0], grid)
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits(x, grid)


def test_images_with_holes():
    wide, weight = torch.randn(2, 3, 8, 12), torch.randn(4, 3, 3, 3)
    learned = torch.tensor(0.1, requires_grad=True)
    grid = Grid(torch.tensor(0.1), torch.tensor(0.0), -8, 7, learned=learned)
    with fused_kernels():
        found = [
            first_conv(x, weight, None, grid, CASES["plain"][2])
            for x in (wide[..., 2:10], wide[..., 2:10].contiguous())
        ]
    assert torch.equal(*found)
