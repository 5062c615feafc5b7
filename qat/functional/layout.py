"""Tensors as arrays of another shape, without a copy: as rows of neighbours, or pixels of images.

Found once for each shape; afterwards a tensor is seen that way in one operation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How to see a tensor, and others of the same shape, as a contiguous array.

    Attributes:
        shape: Of the tensor.
        strides: Of the tensor; it has no holes.
        seen: Shape of the array.
        steps: Strides of the array.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    seen: tuple[int, ...]
    steps: tuple[int, ...]

    def split(self, x: Tensor) -> Tensor:
        """Return ``x`` as the array; a view, unless its strides are others."""
        if x.stride() != self.strides:
            like = torch.empty_strided(self.shape, self.strides, dtype=x.dtype, device=x.device)
            x = like.copy_(x)
        return x.as_strided(self.seen, self.steps)

    def join(self, array: Tensor) -> Tensor:
        """Return an array in the shape of the tensor; a view."""
        return array.as_strided(self.shape, self.strides)


def _layout(shape: torch.Size, strides: tuple[int, ...], seen: tuple[int, ...]) -> Layout:
    return Layout(shape, strides, seen, torch.empty(seen, device="meta").stride())


def flat(x: Tensor) -> Layout | None:
    """Return how to see ``x`` as one row ``(N,)``, or ``None`` where memory has holes."""
    return find_rows(x, torch.Size(()))


def find_images(x: Tensor) -> tuple[Layout, int] | None:
    """Return how to see images ``(N, C, H, W)`` with their pixels on one axis, and that axis.

    It is 2 of ``(N, C, S)``, or 1 of ``(N, S, C)`` where channels are innermost. ``None`` if ``x``
    is no images, has holes, or an axis of size 1.
    """
    return _find_images(x.shape, x.stride())


@functools.lru_cache(4096)
def _find_images(shape: torch.Size, strides: tuple[int, ...]) -> tuple[Layout, int] | None:
    if len(shape) != 4 or 1 in (*shape[:2], shape[2] * shape[3]):
        return None
    num, channels, height, width = shape
    like = torch.empty_strided(shape, strides, device="meta")
    if like.is_contiguous():
        return _layout(shape, strides, (num, channels, height * width)), 2
    if not like.is_contiguous(memory_format=torch.channels_last):
        return None
    return _layout(shape, strides, (num, height * width, channels)), 1


def find_rows(x: Tensor, scale_shape: torch.Size) -> Layout | None:
    """Return how to see ``x`` as rows ``(R, B)`` that have one scale each, in their order.

    Args:
        x: Any tensor.
        scale_shape: A shape that ``expand`` takes for ``x``.

    Returns:
        One row ``(N,)`` where there is one scale; ``None`` where memory has holes, or the elements
        of a scale are not neighbours.
    """
    return _find_rows(x.shape, x.stride(), scale_shape)


@functools.lru_cache(4096)
def _find_rows(
    shape: torch.Size, strides: tuple[int, ...], scale_shape: torch.Size
) -> Layout | None:
    order = tuple(sorted(range(len(shape)), key=strides.__getitem__, reverse=True))
    like = torch.empty_strided(shape, strides, device="meta")
    if not like.permute(order).is_contiguous():
        return None
    num_scales, numel = scale_shape.numel(), shape.numel()
    if num_scales == 1:
        return _layout(shape, strides, (numel,))
    last = max(axis for axis, size in enumerate(scale_shape) if size > 1)
    outer = tuple(range(last + 1))
    whole = all(scale_shape[axis] == shape[axis] for axis in outer[:-1])
    blocks = scale_shape[last] != shape[last]
    if not whole or order[: last + 1] != outer or (blocks and not like.is_contiguous()):
        return None
    return _layout(shape, strides, (num_scales, numel // num_scales))
