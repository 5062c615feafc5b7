"""Requantization without floats: sums of integers times fixed-point multipliers, shifted right.

A real factor ``r`` becomes an integer ``m`` with ``r = m / 2**shift``, as chips have it; a result
is rounded once, ties towards plus infinity. All factors of a sum share one shift.

Source: Jacob et al., arXiv:1712.05877, section 2.2, eq. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.codecs import ActivationCodec
from qat.reference.functions import Lookup, Shares
from qat.reference.values import Accumulator, Affine, Clipped, Pending, Product, Sum

MAX_SHIFT = 62
Term = tuple[Tensor, Tensor]


def multipliers(factors: Sequence[Tensor], bits: int = 31) -> tuple[list[Tensor], Tensor]:
    """Return integers ``m`` and a shift for which ``m / 2**shift`` is next to each real factor.

    Args:
        factors: Real values; their shapes broadcast to one, an entry for each channel.
        bits: Width of the largest ``m``.

    Returns:
        One int64 tensor for each factor, and the shift, int64 from 0 to 62; in each channel the
        largest magnitude of ``m`` lies from ``2**(bits - 1)`` to ``2**bits - 1``, unless it would
        need a shift out of range.
    """
    reals = torch.broadcast_tensors(*(f.double() for f in factors))
    largest = torch.stack([r.abs() for r in reals]).amax(0)
    _, exponent = torch.frexp(largest)
    shift = (bits - exponent).clamp(0, MAX_SHIFT)
    top = 2**bits - 1
    scaled = (torch.ldexp(r, shift).round().clamp(-top, top).long() for r in reals)
    return list(scaled), shift.long()


def shift_right(values: Tensor, shift: Tensor) -> Tensor:
    """Return ``values / 2**shift`` rounded once, ties towards plus infinity; int64.

    Args:
        values: Integers, int64. Shape ``(...)``.
        shift: Integers from 0 to 62; broadcasts against ``values``.
    """
    half = torch.ones_like(shift) << (shift - 1).clamp_min(0)
    return torch.where(shift > 0, (values + half) >> shift, values)


def requantize(terms: Sequence[Term], scale: Tensor, bits: int = 31) -> Tensor:
    """Return ``round(sum(integers * unit) / scale)``, in integers; int64.

    Args:
        terms: Pairs of integers and the real value of their unit; their shapes broadcast.
        scale: Spacing of the grid to round onto, in real units. Shape ``()``.
        bits: Width of the multipliers: 31 for sums of 32 bits, 15 for sums of 48.
    """
    factors, shift = multipliers([unit.double() / scale.double() for _, unit in terms], bits)
    pairs = zip(terms, factors, strict=True)
    total = sum((integers.long() * m for (integers, _), m in pairs), torch.zeros_like(shift))
    return shift_right(total, shift)


def terms(x: Pending) -> tuple[list[Term], int]:
    """Return a result as integers and units, and the width of the multipliers that it allows."""
    match x:
        case Accumulator(shift=None):
            return [(x.sums, x.scale / x.count)], 31 if x.bits == 32 else 15
        case Accumulator(shift=Tensor() as shift):
            one = torch.ones((), dtype=torch.float64, device=shift.device)
            return [(x.sums, x.scale / x.count), (one, shift)], 31 if x.bits == 32 else 15
        case Sum():
            return [(x.a.steps, x.a.grid.scale), (x.b.steps, x.b.grid.scale)], 31
        case Product():
            narrow = max(x.a.grid.spec.bits, x.b.grid.spec.bits) <= 8
            products = x.a.steps.double() * x.b.steps.double()
            return [(products, x.a.grid.scale * x.b.grid.scale)], 31 if narrow else 15
    assert isinstance(x, Affine), f"{type(x).__name__} is not a sum of integers"
    one = torch.ones((), dtype=torch.float64, device=x.steps.device)
    return [(x.steps, x.gain), (one, x.shift)], 31


def fixed_point_codes(x: Pending, grid: ActivationCodec) -> Tensor:
    """Return stored codes of ``x`` on ``grid``, float32, rounded but not held in its range."""
    if isinstance(x, Clipped):
        return x.clip_(fixed_point_codes(x.source, grid), grid)
    if isinstance(x, Lookup | Shares):
        return x.codes(grid)
    parts, bits = terms(x)
    return (requantize(parts, grid.scale, bits) + grid.zero_point.long()).float()
