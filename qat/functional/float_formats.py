"""Small float formats: what a number of few exponent and mantissa bits can hold, as float32.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433 (8 bits);
OCP Microscaling Formats (MX) Specification v1.0, section 5.3 (4 and 6 bits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A sign, an exponent and a mantissa; rounding saturates, so infinities are left out.

    Args:
        exponent_bits: Width of the exponent.
        mantissa_bits: Width of the mantissa behind the leading 1.
        largest: Largest finite value; formats differ in what they give away at the top.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        """Width of a number, with its sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, and of all below it."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number."""
        return math.frexp(self.largest)[1] - 1

    @property
    def smallest(self) -> float:
        """Smallest positive value, a subnormal."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)


FLOAT_FORMATS = {
    "e4m3": FloatFormat(4, 3, 448.0),
    "e5m2": FloatFormat(5, 2, 57344.0),
    "e3m2": FloatFormat(3, 2, 28.0),
    "e2m3": FloatFormat(2, 3, 7.5),
    "e2m1": FloatFormat(2, 1, 6.0),
}
"""Names to formats; ``e4m3`` is PyTorch's ``float8_e4m3fn``, the others have its usual names."""


def floor_power_of_two(x: Tensor) -> Tensor:
    """Return the greatest power of two that is not above ``x``, exactly, shape of ``x``.

    Args:
        x: Positive real values, float32. Shape ``(...)``.
    """
    mantissa, _ = torch.frexp(x)  # in [0.5, 1), so the division is exact
    return x / (2 * mantissa)


def round_to_float(x: Tensor, form: FloatFormat) -> Tensor:
    """Return the nearest number of a format, half to even, as float32, shape of ``x``.

    What lies beyond the largest number becomes the largest; NaN stays.

    Args:
        x: Real values, float32. Shape ``(...)``.
        form: The format.

    Example:
        >>> round_to_float(torch.tensor([0.3, 2.5, -9.0]), FLOAT_FORMATS["e2m1"])
        tensor([ 0.5000,  2.0000, -6.0000])
    """
    x = x.clamp(-form.largest, form.largest)
    power = floor_power_of_two(x.abs().clamp_min(2.0**form.min_exponent))
    spacing = power * 2.0**-form.mantissa_bits
    return (x / spacing).round() * spacing  # all three exact but for the rounding
