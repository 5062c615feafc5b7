"""Observers: each sees tensors and answers one question, which range ``(low, high)`` to cover.

They know nothing of quantizers. Ranges are persistent buffers of final shape; histograms live only
while a calibration runs. With several processes, each of the same number of samples, ranges, sums
and counts are reduced over all of them, so that every process arrives at the same scale.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.functional.affine import dequantize, quantize, scale_from_range
from qat.spec import QuantSpec


def _rows(x: Tensor, shape: torch.Size) -> Tensor:
    """Lay ``x`` out as one row for each entry of a scale of ``shape``."""
    if not shape:
        return x.reshape(1, -1)
    split: list[int] = []
    for size, blocks in zip(x.shape, shape, strict=True):
        split += [blocks, size // blocks]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return x.reshape(split).permute(order).reshape(shape.numel(), -1)


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _reduce_over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    if _num_ranks() > 1:
        both = torch.stack([-low, high])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        low, high = -both[0], both[1]
    return low, high


def _sum_over_ranks(x: Tensor) -> Tensor:
    if _num_ranks() > 1:
        dist.all_reduce(x)
    return x


class MinMax(nn.Module):
    """Cover everything seen since the last reset.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale, hence of ``low`` and ``high``.
    """

    low: Tensor
    high: Tensor
    follows = True
    """Whether the range may keep following the data while training is quantized."""

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("low", torch.full(scale_shape, float("inf")))
        self.register_buffer("high", torch.full(scale_shape, float("-inf")))

    def reset(self) -> None:
        """Forget everything seen."""
        self.low.fill_(float("inf"))
        self.high.fill_(float("-inf"))

    @property
    def empty(self) -> bool:
        """Whether nothing was seen since the last reset."""
        return bool((self.low > self.high).any())

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in real values ``x``, any shape that the scale's shape divides."""
        rows = _rows(x.detach().float(), self.low.shape)
        low, high = _reduce_over_ranks(rows.amin(1), rows.amax(1))
        self._update(rows, low.view_as(self.low), high.view_as(self.high))

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        del rows
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        return self.low, self.high


class UnitRange(MinMax):
    """Cover 0 to 1, whatever was seen: for what is a share by definition, such as a softmax."""

    follows = False

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(0, 1)``, shape of the scale."""
        return self.low * 0, self.high * 0 + 1  # NaN and infinity stay visible


class MovingAverage(MinMax):
    """Follow the range of each batch slowly: ``low += momentum * (batch's low - low)``.

    The first batch sets the range. Weights, which change a little every step, want ``MinMax``.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
        momentum: Share of the newest batch.
    """

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], momentum: float = 0.1
    ) -> None:
        super().__init__(spec, scale_shape)
        self.momentum = momentum

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.empty:
            super()._update(rows, low, high)
        else:
            self.low.lerp_(low, self.momentum)
            self.high.lerp_(high, self.momentum)


class MeanMagnitude(MinMax):
    """Give the range whose scale is LSQ's initial one, ``2 * mean(|x|) / sqrt(qmax)``.

    Source: Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, section 2.1.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
    """

    follows = False

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...]) -> None:
        super().__init__(spec, scale_shape)
        self._sum, self._count = 0.0, 0

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self._sum, self._count = 0.0, 0

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        super()._update(rows, low, high)
        self._sum = self._sum + _sum_over_ranks(rows.abs().sum(1)).view_as(self.low)
        self._count += rows.shape[1] * _num_ranks()

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._count == 0:
            return self.low, self.high
        scale = torch.as_tensor(self._sum * (2 / self._count / self.spec.qmax**0.5))
        if self.spec.symmetric:
            return scale * self.spec.qmin, scale * self.spec.qmax
        shift = self.low.clamp(max=0)
        return shift, shift + scale * (self.spec.qmax - self.spec.qmin)


class Histogram(MinMax):
    """Count values in equal bins that widen, by rebinning, as larger ones come.

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
        old = None if self._counts is None else (self._centres(), self._counts)
        super()._update(rows, low, high)
        one = torch.ones((), dtype=torch.int64, device=rows.device)  # float32 stops at 2**24
        self._counts = _sum_over_ranks(self._count(rows, one))
        if old is not None:
            self._counts += self._count(*old)


class Percentile(Histogram):
    """Leave out the outermost values, ``100 - percentile`` percent of them in all.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
        percentile: Percentage of the values to cover.
    """

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], percentile: float = 99.99
    ) -> None:
        super().__init__(spec, scale_shape)
        self.tail = (1 - percentile / 100) / 2

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._counts is None:
            return self.low, self.high
        share = self._counts.cumsum(1) / self._counts.sum(1, keepdim=True)
        centres = self._centres()
        first = (share > self.tail).float().argmax(1, keepdim=True)
        last = (share >= 1 - self.tail).float().argmax(1, keepdim=True)
        low, high = centres.gather(1, first), centres.gather(1, last)
        return low.view_as(self.low), high.view_as(self.high)


class MeanSquaredError(Histogram):
    """Shrink the observed range until the quantization error is smallest in the mean square.

    Source: Choi et al., "Bridging the Accuracy Gap for 2-bit Quantized Neural Networks", 2018,
    arXiv:1807.06964, minimise the same error for weights; here by a grid search over ranges.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
        candidates: How many fractions of the full range to try.
    """

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], candidates: int = 80) -> None:
        super().__init__(spec, scale_shape)
        self.candidates = candidates

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._counts is None:
            return self.low, self.high
        low, high, centres = self.low.reshape(-1, 1), self.high.reshape(-1, 1), self._centres()
        best = torch.full_like(low, float("inf"))
        best_fraction = torch.ones_like(low)
        for fraction in torch.linspace(0.04, 1.0, self.candidates).tolist():
            scale, zero_point = scale_from_range(low * fraction, high * fraction, self.spec)
            codes = quantize(centres, scale, zero_point, self.spec.qmin, self.spec.qmax)
            miss = (dequantize(codes, scale, zero_point) - centres).square()
            error = (miss * self._counts).sum(1, keepdim=True)
            best_fraction = torch.where(error < best, fraction, best_fraction)
            best = torch.minimum(best, error)
        best_fraction = best_fraction.view_as(self.low)
        return self.low * best_fraction, self.high * best_fraction


OBSERVERS: dict[str, type[MinMax]] = {
    "min_max": MinMax,
    "unit_range": UnitRange,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "mean_magnitude": MeanMagnitude,
}
