"""Blocks of small floats: scales and elements written out block by block."""

import math

import pytest
import torch

from qat.functional.block_formats import (
    join_blocks,
    mx,
    mx_scales,
    nvfp4,
    nvfp4_scales,
    split_blocks,
)
from qat.functional.float_formats import FLOAT_FORMATS, round_to_float

E2M1 = FLOAT_FORMATS["e2m1"]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_blocks_are_padded_with_zeros_and_joined_again(length):
    x = torch.randn(3, 2, length)
    blocks = split_blocks(x, 32)
    assert blocks.shape == (3, 2, math.ceil(length / 32), 32)
    assert torch.equal(join_blocks(blocks, length), x)
    assert not blocks.flatten(-2)[..., length:].any()


@pytest.mark.parametrize(
    ("name", "emax"), [("e4m3", 8), ("e5m2", 15), ("e3m2", 4), ("e2m3", 2), ("e2m1", 2)]
)
def test_mx_is_the_specification_block_by_block(name, emax):
    """Section 6.3: the shared exponent is floor(log2(amax)) less that of the largest element."""
    form, x = (
        FLOAT_FORMATS[name],
        torch.randn(5, 96) * torch.tensor([1e-6, 0.1, 1, 7, 1e8])[:, None],
    )
    result = mx(x, form)
    for row, got in zip(x, result, strict=True):
        for start in range(0, 96, 32):
            block = row[start : start + 32]
            scale = 2.0 ** (math.floor(math.log2(float(block.abs().max()))) - emax)
            expected = round_to_float(block / scale, form) * scale
            assert torch.equal(got[start : start + 32], expected)
            assert float(expected.abs().max()) > float(block.abs().max()) / 2


def test_largest_values_of_an_mx_block_saturate():
    """The scale of 7.9 is 1, and fp4 ends at 6."""
    x = torch.zeros(32)
    x[:3] = torch.tensor([7.9, 5.1, -0.3])
    assert mx(x, E2M1)[:3].tolist() == [6.0, 6.0, -0.5]


@pytest.mark.parametrize("power", [-149, -127, -126, -60, 0, 100, 127])
def test_mx_scales_of_extreme_blocks_are_powers_of_two_that_float32_has(power):
    scale = float(mx_scales(torch.full((1, 32), 2.0**power), E2M1))
    assert scale == 2.0 ** max(power - 2, -126)
    x = torch.full((32,), 2.0**power)
    assert torch.equal(mx(x, E2M1), x if power >= -127 else x * 0)


@pytest.mark.parametrize("rounded", [lambda x: mx(x, E2M1), nvfp4], ids=["mx", "nvfp4"])
def test_zeros_stay_zeros(rounded):
    assert torch.equal(rounded(torch.zeros(2, 40)), torch.zeros(2, 40))
    x = torch.zeros(2, 64)
    x[0, 0] = 3.0
    assert torch.equal(rounded(x), x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_mx_block_with_a_value_that_is_not_finite_is_nan(bad):
    x = torch.ones(64)
    x[3] = bad
    result = mx(x, E2M1)
    assert result[:32].isnan().all()
    assert torch.equal(result[32:], x[32:])


def test_nvfp4_is_two_scales_block_by_block():
    x = torch.randn(3, 40) * torch.tensor([0.01, 1, 30])[:, None]
    tensor_scale = x.abs().max() / (6 * 448)
    result = nvfp4(x)
    for row, got in zip(x, result, strict=True):
        for start in (0, 16, 32):
            block = row[start : start + 16]
            wanted = block.abs().max() / 6 / tensor_scale
            block_scale = wanted.to(torch.float8_e4m3fn).float().clamp_min(2.0**-9)
            scale = block_scale * tensor_scale
            expected = round_to_float(block / scale, E2M1) * scale
            assert torch.equal(got[start : start + 16], expected)


def test_nvfp4_scales_of_the_widest_and_of_tiny_blocks():
    x = torch.full((3, 16), 6.0)
    x[1] = 1e-12
    scales, tensor_scale = nvfp4_scales(split_blocks(x, 16))
    assert scales.flatten().tolist() == [448.0, 2.0**-9, 448.0]
    assert float(tensor_scale) == pytest.approx(1 / 448, rel=1e-7)
    assert nvfp4(x)[1].abs().max() == 0
