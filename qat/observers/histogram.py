"""Histogram: what is common to observers that look at the whole distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.observers.base import MinMax, sum_over_ranks
from qat.spec import QuantSpec


class Histogram(MinMax):
    """Count values in equal bins that widen, by rebinning, as larger ones come.

    Counting moves a value by at most half a bin, and so does each rebinning: behind ``k`` batches,
    or merges, a value lies within ``k / 2`` of the final bins of where it was. The ends are exact.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale; each of its entries has a histogram of its own.
        bins: Bins for one scale; fewer where there are very many scales.
    """

    follows = False

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], bins: int = 2048) -> None:
        super().__init__(spec, scale_shape)
        self.bins = min(bins, max(64, 2**23 // self.low.numel()))
        self._counts: Tensor | None = None

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self._counts = None

    def _edges(self) -> tuple[Tensor, Tensor]:
        low = self.low.reshape(-1, 1)
        return low, ((self.high.reshape(-1, 1) - low) / self.bins).clamp_min(1e-30)

    def _centres(self) -> Tensor:
        low, width = self._edges()
        return low + (torch.arange(self.bins, device=low.device) + 0.5) * width

    def _count(self, values: Tensor, weights: Tensor) -> Tensor:
        low, width = self._edges()
        index = ((values - low) / width).long().clamp_(0, self.bins - 1)
        counts = weights.new_zeros(values.shape[0], self.bins)
        return counts.scatter_add_(1, index, weights.expand_as(values))

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        seen = self._snapshot()
        super()._update(rows, low, high)  # low and high are those of all processes: equal edges
        one = torch.ones((), dtype=torch.int64, device=rows.device)  # float32 stops at 2**24
        self._counts = sum_over_ranks(self._count(rows, one))
        self._add(seen)

    def _snapshot(self) -> tuple[Tensor, Tensor] | None:
        return None if self._counts is None else (self._centres(), self._counts)

    def _add(self, seen: tuple[Tensor, Tensor] | None) -> None:
        if seen is not None:
            counts = self._count(*seen)
            self._counts = counts if self._counts is None else self._counts + counts

    @torch.no_grad()
    def merge(self, other: Histogram) -> None:
        """Take in what ``other`` saw, as if it had been seen here, up to one rebinning.

        Args:
            other: Made for the same format, shape and bins; it stays as it is.
        """
        assert (other.bins, other.low.shape) == (self.bins, self.low.shape)
        parts = self._snapshot(), other._snapshot()
        torch.minimum(self.low, other.low, out=self.low)
        torch.maximum(self.high, other.high, out=self.high)
        self._counts = None
        for part in parts:
            self._add(part)
