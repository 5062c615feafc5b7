"""What backwards need of quantized tensors, kept as codes: one byte for each value.

A convolution keeps its input, which lies on a grid. Where the fused kernels made that input, its
codes are kept in its place, and the very same values are computed again in the backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_kept: dict[int, tuple[weakref.ref[Tensor], Codes]] = {}


@dataclass(frozen=True)
class Codes:
    """A tensor on a grid.

    Attributes:
        codes: uint8 codes, counted from the lowest, in the tensor's order in memory.
        rebuild: Makes the tensor of them.
    """

    codes: Tensor
    rebuild: Callable[[Tensor], Tensor]

    def values(self) -> Tensor:
        """Return the tensor, bit for bit."""
        return self.rebuild(self.codes)


@dataclass(frozen=True)
class _View:
    """A view of a tensor that is kept as codes."""

    source: Codes
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        return self.source.values().as_strided(self.size, self.stride, self.offset)


def keep(y: Tensor, codes: Tensor, rebuild: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``y``, and remember that it can be made of ``codes`` for as long as it lives.

    Args:
        y: A new tensor that fills its storage, or a view of one.
        codes: uint8, one for each of its elements.
        rebuild: Makes ``y``, bit for bit and with its strides, of ``codes``.
    """
    y = y.data  # no view: what is a view of it then keeps it alive, and not what it was made of
    address = y.untyped_storage().data_ptr()
    _kept[address] = weakref.ref(y, lambda _: _kept.pop(address, None)), Codes(codes, rebuild)
    return y


def _pack(x: Tensor) -> Any:
    y, codes = _kept.get(x.untyped_storage().data_ptr(), (None, None))
    source = None if y is None else y()
    if source is None or codes is None or source._version or x.dtype != source.dtype:
        return x
    return _View(codes, x.size(), x.stride(), int(x.storage_offset()))


def _unpack(kept: Any) -> Tensor:
    return kept.values() if isinstance(kept, _View) else kept


def kept_as_codes() -> AbstractContextManager[None]:
    """Inside, backwards keep the codes of tensors that ``keep`` knows in their place."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
