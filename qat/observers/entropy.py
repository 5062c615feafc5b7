"""Entropy: the range whose codes tell most about the distribution, as TensorRT calibrates.

Source: Migacz, "8-bit Inference with TensorRT", GTC 2017, slides "Entropy Calibration -
pseudocode": of all thresholds, the one with the least Kullback-Leibler divergence of the quantized
histogram from the clipped one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.functional.affine import quantize, scale_from_range
from qat.observers.histogram import Histogram
from qat.spec import QuantSpec

LOWEST = 1 / 16
"""The first candidate of the talk: 128 of 2048 bins."""


def entropy_loss(counts: Tensor, codes: Tensor, inside: Tensor) -> Tensor:
    """Return the divergence ``KL(P || Q)`` of one candidate, in nats, shape ``(R,)``.

    ``P`` is the histogram with what lies outside moved to the nearest occupied bin inside; ``Q``
    spreads what bins of one code hold evenly over those of them that are occupied.

    Args:
        counts: Values in each bin, float64. Shape ``(R, B)``.
        codes: The code of each bin's centre, rising along a row. Shape ``(R, B)``.
        inside: Whether that code was not clipped. Shape ``(R, B)``.

    Returns:
        Infinity for rows with nothing inside.
    """
    kept = counts * inside
    occupied = kept > 0
    index = torch.arange(counts.shape[1], device=counts.device).expand_as(codes)
    first = occupied.float().argmax(1, keepdim=True)
    last = torch.where(occupied, index, -1).amax(1, keepdim=True).clamp_min(0)
    clipped = counts.scatter_add(1, first, (counts * (index < first)).sum(1, keepdim=True))
    clipped.scatter_add_(1, last, (counts * (index > last)).sum(1, keepdim=True))
    p = clipped * occupied / clipped.mul(occupied).sum(1, keepdim=True)
    group = F.pad(codes.diff(dim=1).ne(0).cumsum(1), (1, 0))  # counts the codes from the left
    sums, sizes = (
        torch.zeros_like(counts).scatter_add_(1, group, x.double()).gather(1, group)
        for x in (kept, occupied)
    )
    q = sums / sizes.clamp_min(1) / kept.sum(1, keepdim=True)
    terms = torch.where(occupied, p * (p / q).log(), 0)
    return torch.where(occupied.any(1), terms.sum(1), float("inf"))


class Entropy(Histogram):
    """Shrink the observed range until the histogram on the grid diverges least from the clipped.

    Differs from the talk, whose thresholds are for magnitudes in 128 equal parts: bins are put
    together by the codes of the format's own grid, so that unsigned and affine formats and all
    widths follow the same rule, and what is clipped goes to the outermost bin that holds anything,
    where the divergence stays finite. Of equally good ranges the widest is taken.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
        candidates: How many fractions of the full range to try, from 1/16 on.
    """

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], candidates: int = 121
    ) -> None:
        super().__init__(spec, scale_shape)
        self.candidates = candidates

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._counts is None:
            return self.low, self.high
        low, high = self.low.reshape(-1, 1), self.high.reshape(-1, 1)
        best = torch.full_like(low[:, 0], float("inf"), dtype=torch.float64)
        best_fraction = torch.ones_like(low[:, 0])
        for fraction in torch.linspace(LOWEST, 1.0, self.candidates).tolist():
            loss = self._loss(low * fraction, high * fraction)
            best_fraction = torch.where(loss <= best, fraction, best_fraction)
            best = torch.minimum(best, loss)
        best_fraction = best_fraction.view_as(self.low)
        return self.low * best_fraction, self.high * best_fraction

    def _loss(self, low: Tensor, high: Tensor) -> Tensor:
        assert self._counts is not None
        spec, centres = self.spec, self._centres()
        scale, zero_point = scale_from_range(low, high, spec)
        codes = quantize(centres, scale, zero_point, spec.qmin, spec.qmax)
        inside = (centres / scale).round() + zero_point == codes
        return entropy_loss(self._counts.double(), codes, inside)
