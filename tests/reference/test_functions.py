"""Look-up tables over all codes, and the softmax of integers against exact rationals."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from qat.reference.functions import EXP_BITS, Lookup, Shares, every_code
from tests.reference.test_run import SCALES, grid, on_grid

FUNCTIONS = [torch.sigmoid, torch.tanh, F.silu, F.gelu, F.hardswish, F.hardsigmoid]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("a", "c"), list(itertools.permutations(SCALES, 2))[::2])
def test_tables_hold_what_the_function_makes_of_every_code(function, a, c):
    codec, out = grid(*a), grid(*c)
    x = on_grid(torch.arange(256), codec)
    expected = out.codes(function(x.real())).float()
    assert torch.equal(Lookup(x, function).codes(out), expected)
    assert torch.equal(Lookup(x, function).real(), function(x.real()))


def test_every_code_of_the_storage_is_listed():
    codec = grid(0.5, 3)
    assert torch.equal(every_code(codec), (torch.arange(256.0) - 3) * 0.5)


def shares(steps: list[int], scale: float, unit: float) -> list[int]:
    """Write the formula out in rational numbers."""
    powers = [round(math.exp((s - max(steps)) * scale) * 2**EXP_BITS) for s in steps]
    per_unit = round(2**EXP_BITS / unit)
    total = sum(powers) * 2**EXP_BITS
    return [math.floor(Fraction(p * per_unit, total) + Fraction(1, 2)) for p in powers]


@pytest.mark.parametrize("scale", [0.02, 0.11, 1.0])
def test_softmax_of_integers_is_the_formula(scale):
    codec, out = grid(scale, 128), grid(1 / 255, 0)
    triples = torch.tensor(list(itertools.product(range(0, 256, 51), repeat=3)))
    codes = Shares(on_grid(triples, codec), -1).codes(out)
    steps = (triples - 128).tolist()
    real, unit = codec.scale.item(), out.scale.item()
    assert codes.tolist() == [shares(row, real, unit) for row in steps]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_of_integers_is_next_to_that_of_reals(dim):
    codec, out = grid(0.05, 100), grid(1 / 255, 0)
    x = on_grid(torch.randint(0, 256, (64, 65), generator=torch.Generator().manual_seed(0)), codec)
    codes = Shares(x, dim).codes(out)
    expected = out.codes(Shares(x, dim).real()).float()
    assert (codes - expected).abs().max() <= 1
    assert (codes != expected).double().mean() < 0.01  # only those next to a tie


def test_one_code_alone_has_all():
    out = grid(1 / 255, 0)
    x = on_grid(torch.tensor([[7], [200]]), grid(0.3, 0))
    assert Shares(x, 1).codes(out).flatten().tolist() == [255.0, 255.0]
