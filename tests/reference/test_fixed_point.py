"""Fixed-point requantization against exact rational arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from qat.reference.fixed_point import fixed_point_codes, multipliers, requantize, shift_right
from qat.reference.values import Accumulator, Affine, Clipped, Product, Sum
from tests.reference.test_run import SCALES, grid, on_grid

FACTORS = [2.0**-40, 1e-7, 3e-5, 0.0078125, 1 / 255, 0.1, 1 / 3, 0.5, 0.999999, 1.0, 1.5, 37.2, 4e3]
HALF = Fraction(1, 2)


def nearest(value: Fraction) -> int:
    """Round as the chip does: ties towards plus infinity."""
    return math.floor(value + HALF)


def test_shifts_of_all_small_integers_are_quotients_rounded_upwards_at_ties():
    values = torch.arange(-700, 701)
    for shift in range(11):
        expected = [nearest(Fraction(v, 2**shift)) for v in values.tolist()]
        assert shift_right(values, torch.tensor(shift)).tolist() == expected


@pytest.mark.parametrize("bits", [15, 31])
def test_multipliers_use_all_their_bits(bits):
    factors = torch.tensor([f for f in FACTORS if 2.0**-31 < f < 2**10], dtype=torch.float64)
    (m,), shift = multipliers([factors], bits)
    assert ((m >= 2 ** (bits - 1)) & (m < 2**bits)).all()
    for real, integer, places in zip(factors.tolist(), m.tolist(), shift.tolist(), strict=True):
        assert abs(Fraction(integer, 2**places) / Fraction(real) - 1) <= Fraction(1, 2**bits)


def test_multipliers_of_a_sum_share_their_shift():
    a, b = torch.tensor([0.5, 1e-3]), torch.tensor([1e-6, 1e-3])
    (m, n), shift = multipliers([a, b])
    for i in range(2):
        assert abs(Fraction(int(m[i]), 2 ** int(shift[i])) - Fraction(a[i].item())) < 2.0**-31
        assert abs(Fraction(int(n[i]), 2 ** int(shift[i])) - Fraction(b[i].item())) < 2.0**-31


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("bits", "top"), [(31, 2**31 - 1), (15, 2**47 - 1)])
def test_requantization_is_one_multiplication_and_one_shift(factor, bits, top):
    small, ends = list(range(-2000, 2001)), [top - 3, top, -top]
    sums = torch.tensor(small + ends, dtype=torch.float64)
    unit, scale = torch.tensor(factor, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    (m,), shift = multipliers([unit], bits)
    real = Fraction(int(m), 2 ** int(shift))
    codes = requantize([(sums, unit)], scale, bits).tolist()
    assert codes == [nearest(v * real) for v in small + ends]


@pytest.mark.parametrize(("a", "b", "c"), list(itertools.permutations(SCALES, 3))[::3])
@pytest.mark.parametrize("kind", [Sum, Product])
def test_all_pairs_of_codes_round_to_the_nearest(kind, a, b, c):
    left, right, out = grid(*a), grid(*b), grid(*c)
    every = torch.arange(256)
    x, y = (t.flatten() for t in torch.meshgrid(every, every, indexing="ij"))
    codes = fixed_point_codes(kind(on_grid(x, left), on_grid(y, right)), out).double()
    reals = [
        (v.double() - codec.zero_point) * codec.scale.double()
        for v, codec in ((x, left), (y, right))
    ]
    total = reals[0] + reals[1] if kind is Sum else reals[0] * reals[1]
    exact = total / out.scale.double() + out.zero_point
    largest = (exact - out.zero_point).abs().max()
    assert (codes - exact).abs().max() <= 0.5 + largest * 2**-29  # two multipliers, each 2**-30


def test_averages_divide_by_their_count():
    codec, out = grid(0.1, 3), grid(0.07, 5)
    sums = torch.arange(-5000, 5001, dtype=torch.float64)
    codes = fixed_point_codes(Accumulator(sums, codec.scale, count=49), out).double()
    exact = sums * codec.scale.double() / 49 / out.scale.double() + 5
    assert (codes - exact).abs().max() <= 0.5 + 1e-5


def test_each_channel_has_its_multiplier():
    scale = torch.tensor([0.5, 0.003]).view(2, 1)
    sums = torch.arange(-400, 400, dtype=torch.float64).expand(2, -1)
    out = grid(0.11, 0)
    codes = fixed_point_codes(Accumulator(sums, scale), out).double()
    exact = sums * scale.double() / out.scale.double()
    assert (codes - exact).abs().max() <= 0.5 + 1e-5


def test_shifts_are_added_before_rounding():
    codec, out = grid(0.02, 0), grid(0.05, 7)
    steps = torch.arange(256.0)
    gain, shift = torch.tensor(-1.3) * codec.scale, torch.tensor(0.777)
    codes = fixed_point_codes(Affine(steps, gain, shift), out).double()
    exact = (steps.double() * gain.double() + shift.double()) / out.scale.double() + 7
    assert (codes - exact).abs().max() <= 0.5 + 1e-5


def test_clipping_is_of_codes():
    out = grid(0.1, 10)
    source = Accumulator(torch.arange(-100.0, 200.0), torch.tensor(0.1))
    codes = fixed_point_codes(Clipped(source, 0.0, 6.0), out)
    assert torch.equal(codes, fixed_point_codes(source, out).clamp(10, 70))


def test_products_of_wide_codes_do_not_wrap():
    codec, out = grid(1.0, 0), grid(1.0, 0)
    codec.spec = type(codec.spec)(16, signed=False, symmetric=False)
    ends = torch.tensor([65535.0, -65535.0, 1.0])
    x = on_grid(ends, codec)
    y = on_grid(ends.flip(0), codec)
    expected = torch.tensor([65535.0, 65535.0**2, 65535.0])  # float32 cuts the square to 24 bits
    assert torch.equal(fixed_point_codes(Product(x, y), out), expected)
