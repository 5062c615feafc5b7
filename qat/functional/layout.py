"""Tensors as rows of neighbours in memory, or as pixels and channels, without a copy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``x`` without its history, copied only if its strides are others."""
    x = x.detach()
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


class Rows(NamedTuple):
    """How to see a tensor, and others of the same layout, as rows ``(R, B)`` or one row ``(N,)``.

    Attributes:
        order: Its axes, from the longest stride to the shortest.
        permuted: Its shape with axes in that order.
        shape: Shape of the rows.
        strides: Its strides.
    """

    order: tuple[int, ...]
    permuted: torch.Size
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def split(self, x: Tensor) -> Tensor:
        """Return the elements of ``x`` as rows; a view, unless its strides are others."""
        return _with_strides(x, self.strides).permute(self.order).reshape(self.shape)

    def join(self, rows: Tensor) -> Tensor:
        """Return ``rows`` in the shape of the tensor; a view."""
        y = rows.view(self.permuted)
        return y.permute(sorted(range(len(self.order)), key=self.order.__getitem__))


class Images(NamedTuple):
    """How to see images ``(N, C, H, W)`` with their pixels on one axis.

    Attributes:
        like: A tensor of that shape and those strides, without memory.
        axis: Of the pixels: 2 of ``(N, C, S)``, or 1 of ``(N, S, C)`` where channels are innermost.
    """

    like: Tensor
    axis: int

    def split(self, x: Tensor) -> Tensor:
        """Return ``x`` with its pixels on one axis; a view, unless its strides are others."""
        x = _with_strides(x, self.like.stride())
        return x.flatten(2) if self.axis == 2 else x.permute(0, 2, 3, 1).flatten(1, 2)

    def join(self, pixels: Tensor) -> Tensor:
        """Return ``pixels`` as images; a view."""
        num, channels, height, width = self.like.shape
        if self.axis == 2:
            return pixels.view(num, channels, height, width)
        return pixels.view(num, height, width, channels).permute(0, 3, 1, 2)

    def channels(self, values: Tensor) -> Tensor:
        """Return values of the channels ``(C,)`` so that they broadcast against pixels."""
        return values.detach().view(1, -1, 1) if self.axis == 2 else values.detach().view(1, 1, -1)


def find_images(x: Tensor) -> Images | None:
    """Return how to see ``x`` as images, or ``None`` if it is none, or has an axis of size 1."""
    if x.ndim != 4 or 1 in (*x.shape[:2], x.shape[2] * x.shape[3]):
        return None
    like = x.detach().to("meta")
    if x.is_contiguous():
        return Images(like, 2)
    return Images(like, 1) if x.is_contiguous(memory_format=torch.channels_last) else None


def find_rows(x: Tensor, scale_shape: torch.Size) -> Rows | None:
    """Return how to see ``x`` as rows that have one scale each, in the order of the scales.

    Args:
        x: Any tensor.
        scale_shape: A shape that ``expand`` takes for ``x``.

    Returns:
        ``None`` where memory has holes, or the elements of a scale are not neighbours.
    """
    order = tuple(sorted(range(x.ndim), key=x.stride, reverse=True))
    permuted = x.permute(order)
    if not permuted.is_contiguous():
        return None
    num_scales = scale_shape.numel()
    if num_scales == 1:
        return Rows(order, permuted.shape, (x.numel(),), x.stride())
    last = max(axis for axis, size in enumerate(scale_shape) if size > 1)
    outer = tuple(range(last + 1))
    whole = all(scale_shape[axis] == x.shape[axis] for axis in outer[:-1])
    blocks = scale_shape[last] != x.shape[last]
    if not whole or order[: last + 1] != outer or (blocks and not x.is_contiguous()):
        return None
    return Rows(order, permuted.shape, (num_scales, x.numel() // num_scales), x.stride())
