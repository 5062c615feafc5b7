"""Gradients of a convolution one by one: the very same numbers, and never both factors at once."""

import pytest
import torch
from torch.nn import functional as F

from qat.functional import convolution, fused
from qat.functional.convolution import Convolution, convolve_large, is_large
from qat.functional.fake_quantize import fake_quantize
from qat.functional.fused import fused_kernels
from qat.functional.kept import Recipe, kept_as_codes
from qat.spec import QuantSpec

CASES = {
    "plain": ((4, 6, 9, 9), (8, 6, 3, 3), Convolution([1, 1], [1, 1], [1, 1])),
    "strided": ((4, 4, 12, 10), (8, 4, 3, 3), Convolution([2, 1], [1, 0], [1, 1])),
    "pixels": ((4, 8, 5, 5), (16, 8, 1, 1), Convolution([1, 1], [0, 0], [1, 1])),
    "dilated groups": ((2, 8, 11, 10), (6, 4, 3, 2), Convolution([1, 2], [2, 0], [2, 1], 2)),
}


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)
    monkeypatch.setattr(convolution, "LARGE", 1)


def leaves(case, memory, has_bias):
    shape, weight_shape, how = CASES[case]
    x = torch.randn(shape).to(memory_format=memory).requires_grad_()
    weight = torch.randn(weight_shape).to(memory_format=memory).requires_grad_()
    bias = torch.randn(weight_shape[0], requires_grad=True) if has_bias else None
    return x, weight, bias, how


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_call(case, has_bias, memory):
    x, weight, bias, how = leaves(case, memory, has_bias)
    with fused_kernels():
        assert is_large(x, weight)
    ys = convolve_large(x, weight, bias, how), F.conv2d(x, weight, bias, *how)
    assert torch.equal(*ys)
    upstream = torch.randn(ys[0].shape)  # in rows, whatever the images' order
    wanted = [x, weight, *([] if bias is None else [bias])]
    found, expected = (torch.autograd.grad(y, wanted, upstream) for y in ys)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [g.stride() for g in found] == [g.stride() for g in expected]


def test_images_may_want_no_gradient():
    x, weight, bias, how = leaves("plain", torch.channels_last, has_bias=True)
    convolve_large(x.detach(), weight, bias, how).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_the_weight_is_let_go_before_the_image_is_made_again(monkeypatch):
    """Both are kept as codes; values are made in turn, and the same as ever."""
    x, weight, _, how = leaves("plain", torch.channels_last, has_bias=False)
    scale, zero = torch.tensor(0.02), torch.tensor(0.0)
    made, alive, make = [], [], Recipe.values

    def values(recipe):
        alive.append(sum(not storage.expired() for storage in made))
        found = make(recipe)
        made.append(torch.multiprocessing.reductions.StorageWeakRef(found.untyped_storage()))
        return found

    def step(function):
        with fused_kernels(), kept_as_codes():
            snapped = [fake_quantize(t, scale, zero, QuantSpec(8)) for t in (x, weight)]
            y = function(*snapped)
            del snapped
        return torch.autograd.grad(y.square().sum(), [x, weight])

    expected = step(lambda a, b: F.conv2d(a, b, None, *how))
    monkeypatch.setattr(Recipe, "values", values)
    found = step(lambda a, b: convolve_large(a, b, None, how))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert alive == [0, 0]


def test_what_is_no_gain_is_left_to_torch(monkeypatch):
    x, weight, _, _ = leaves("plain", torch.contiguous_format, has_bias=False)
    assert not is_large(x, weight)  # kernels are switched off
    with fused_kernels():
        assert not is_large(x, weight.detach())
        assert not is_large(x.bfloat16(), weight.bfloat16())
        assert not is_large(x[0], weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_large(x, weight)
        with torch.no_grad():
            assert not is_large(x, weight)
        monkeypatch.setattr(convolution, "LARGE", weight.numel() + 1)
        assert not is_large(x, weight)
