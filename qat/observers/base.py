"""What every observer is: it sees tensors and answers which range ``(low, high)`` to cover.

Ranges are persistent buffers of final shape; all else that an observer gathers lives only while a
calibration runs. With several processes, each of the same number of samples, ranges, sums and
counts are reduced over all of them, so that every process arrives at the same scale.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.spec import QuantSpec


def rows_of(x: Tensor, shape: torch.Size) -> Tensor:
    """Lay ``x`` out as one row for each entry of a scale.

    Args:
        x: Real values, any shape that the scale's shape divides.
        shape: Shape of the scale.
    """
    if not shape:
        return x.reshape(1, -1)
    split: list[int] = []
    for size, blocks in zip(x.shape, shape, strict=True):
        split += [blocks, size // blocks]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return x.reshape(split).permute(order).reshape(shape.numel(), -1)


def num_ranks() -> int:
    """Return how many processes observe together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduce_over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest ``low`` and the highest ``high`` of all processes, real units."""
    if num_ranks() > 1:
        both = torch.stack([-low, high])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        low, high = -both[0], both[1]
    return low, high


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all processes, in place. Shape ``(...)``."""
    if num_ranks() > 1:
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
        rows = rows_of(x.detach().float(), self.low.shape)
        low, high = reduce_over_ranks(rows.amin(1), rows.amax(1))
        self._update(rows, low.view_as(self.low), high.view_as(self.high))

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        del rows
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        return self.low, self.high
