"""What backwards need of quantized tensors, kept as codes: one byte for each value.

A convolution keeps its input, which lies on a grid. Where the fused kernels made that input, its
codes are kept in its place, and the very same values are computed again in the backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.layout import Layout, flat

_kept: dict[int, tuple[weakref.ref[Tensor], Recipe]] = {}


class Recipe(NamedTuple):
    """How a tensor on a grid is made again, bit for bit.

    Attributes:
        source: Its codes, uint8, counted from the lowest, or the parameter they are made of.
        make: Makes the values of ``source``, in the same order in memory; float32.
        layout: Of the tensor.
        dtype: Of the tensor.
        grid: Scale, zero point and lowest code, shape ``()``, of codes on one grid.
    """

    source: Tensor
    make: Callable[[Tensor], Tensor]
    layout: Layout
    dtype: torch.dtype
    grid: tuple[Tensor, ...] | None = None

    def values(self) -> Tensor:
        """Return the tensor."""
        return self.layout.join(self.make(self.source).to(self.dtype))


class _View(NamedTuple):
    """A view of a tensor that is kept as a recipe."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        return self.recipe.values().as_strided(self.size, self.stride, self.offset)


class Codes(NamedTuple):
    """A tensor as codes on one grid.

    Attributes:
        codes: uint8, counted from the lowest, with the tensor's shape and strides.
        recipe: What they are a view of.
    """

    codes: Tensor
    recipe: Recipe


def keep(y: Tensor, recipe: Recipe) -> Tensor:
    """Return ``y``, and remember how it is made for as long as it lives.

    Args:
        y: A new tensor that fills its storage, or a view of one.
        recipe: Makes ``y``.
    """
    y = y.data  # no view: what is a view of it then keeps it alive, and not what it was made of
    remember(y, recipe)
    return y


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def remember(y: Tensor, recipe: Recipe) -> None:
    """Know how the memory of ``y`` is made for as long as ``y``, or a view of it, lives.

    Args:
        y: A tensor, or a view of one that nothing else refers to.
        recipe: Makes all of that memory.
    """
    address = _address(y)
    _kept[address] = weakref.ref(y, lambda _: _kept.pop(address, None)), recipe


def _find(x: Tensor) -> _View | None:
    y, recipe = _kept.get(_address(x), (None, None))
    source = None if y is None else y()
    if source is None or recipe is None or source._version or x.dtype != source.dtype:
        return None
    return _View(recipe, x.size(), x.stride(), int(x.storage_offset()))


def find_recipe(x: Tensor) -> Recipe | None:
    """Return what makes the memory of ``x``, where it is known."""
    found = _find(x)
    return None if found is None else found.recipe


def find_codes(x: Tensor) -> Codes | None:
    """Return ``x`` as codes, where it is known to lie on one grid."""
    found = _find(x)
    if found is None or found.recipe.grid is None:
        return None
    codes = found.recipe.source.as_strided(found.size, found.stride, found.offset)
    return Codes(codes, found.recipe)


def rearranged(x: Tensor, rearrange: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``rearrange(x)``; where that is a copy, it is kept as codes if ``x`` is.

    Args:
        x: Any tensor.
        rearrange: Moves elements of any type, and does nothing else with them.
    """
    y, codes = rearrange(x), find_codes(x)
    layout = flat(y)
    if codes is not None and layout is not None and _address(y) != _address(x):
        copied = layout.split(rearrange(codes.codes))
        remember(y, codes.recipe._replace(source=copied, layout=layout))
    return y


def _pack(x: Tensor) -> Any:
    found = _find(x)
    return x if found is None else found


def _unpack(kept: Any) -> Tensor:
    return kept.values() if isinstance(kept, _View) else kept


def save_apart(ctx: Any, *tensors: Tensor) -> None:
    """Keep tensors for a backward that needs their values one after the other.

    What is saved otherwise is made of its codes all at once.
    """
    ctx.apart = [_find(x) for x in tensors]
    known = zip(tensors, ctx.apart, strict=True)
    ctx.save_for_backward(*(x if found is None else None for x, found in known))


def saved_apart(ctx: Any, index: int, *, blank: bool = False) -> Tensor:
    """Return one of the tensors that ``save_apart`` kept.

    Args:
        ctx: Of the backward.
        index: Which one it is.
        blank: Its shape and its order in memory are wanted, and its values are not.
    """
    found = ctx.apart[index]
    if found is None:
        return ctx.saved_tensors[index]
    if not blank:
        return found.values()
    recipe = found.recipe
    return recipe.source.new_empty(0, dtype=recipe.dtype).new_empty_strided(
        found.size, found.stride
    )


def kept_as_codes() -> AbstractContextManager[None]:
    """Inside, backwards keep the codes of tensors that ``keep`` knows in their place."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
