"""Contractions of two tensors as matrix products, which have integer kernels everywhere.

The indices of ``einsum`` fall into those of the batch (in both operands and in the result), those
that are summed over (in both operands alone), and those that only one operand brings.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor, matmul

_DOTS = "..."
Index = Hashable


class Indices(NamedTuple):
    """The indices of a contraction: of each operand and of the result, in their order."""

    left: list[Index]
    right: list[Index]
    result: list[Index]


def find_indices(equation: Any, operands: tuple[Any, ...]) -> Indices | None:
    """Return the indices of a contraction of two tensors; ``None`` for any other ``einsum``.

    Args:
        equation: As ``torch.einsum`` takes it.
        operands: Tensors.
    """
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    left, right = (_expand(t, x.ndim) for t, x in zip(terms, operands, strict=True))
    if left is None or right is None:
        return None
    dots = max(([i for i in side if isinstance(i, int)] for side in (left, right)), key=len)
    result = _name(output, dots) if arrow else _implicit(left, right, dots)
    found = Indices(left, right, result)
    return found if _is_contraction(found, operands) else None


def contract(indices: Indices, a: Tensor, b: Tensor) -> Tensor:
    """Return the contraction of ``a`` and ``b`` as one matrix product.

    Args:
        indices: What ``find_indices`` returned for them.
        a: The left operand.
        b: The right operand.
    """
    left, right, result = indices
    batch = [i for i in result if i in left and i in right]
    summed = [i for i in left if i in right and i not in result]
    rows = [i for i in result if i in left and i not in right]
    columns = [i for i in result if i in right and i not in left]
    sizes = {**dict(zip(left, a.shape, strict=True)), **dict(zip(right, b.shape, strict=True))}
    a = _merge(_merge(_order(a, left, [*batch, *rows, *summed]), -1, summed), -2, rows)
    b = _merge(_merge(_order(b, right, [*batch, *summed, *columns]), -1, columns), -2, summed)
    y = _split(_split(matmul(a, b), -2, rows, sizes), -1, columns, sizes)
    return _order(y, [*batch, *rows, *columns], result)


def _expand(term: str, rank: int) -> list[Index] | None:
    """Name the indices of one operand; what ``...`` stands for by number, the last one 0."""
    named = len(term.replace(_DOTS, ""))
    count = rank - named
    has_dots = _DOTS in term
    if count < 0 or (count and not has_dots):
        return None
    return _name(term, list(range(count - 1, -1, -1)))


def _name(term: str, dots: list[Any]) -> list[Index]:
    before, found, after = term.partition(_DOTS)
    return [*before, *(dots if found else []), *after]


def _implicit(left: list[Index], right: list[Index], dots: list[Any]) -> list[Index]:
    """Return the indices of a result that is not written: those that appear once, in order."""
    every = [i for i in [*left, *right] if isinstance(i, str)]
    return [*dots, *sorted(i for i in every if every.count(i) == 1)]


def _is_contraction(indices: Indices, operands: tuple[Any, ...]) -> bool:
    """Whether something is summed over, in both operands at once, and nothing repeats."""
    left, right, result = indices
    summed = [i for i in left if i in right and i not in result]
    alone = [i for i in left + right if (i in left) != (i in right) and i not in result]
    whole = all(len(set(side)) == len(side) for side in indices)
    sizes = [operands[0].shape[left.index(i)] == operands[1].shape[right.index(i)] for i in summed]
    return bool(summed) and not alone and whole and all(sizes)


def _order(x: Tensor, have: list[Index], want: list[Index]) -> Tensor:
    return x if have == want else x.permute([have.index(i) for i in want])


def _merge(x: Tensor, axis: int, indices: list[Index]) -> Tensor:
    """Make one axis, ``axis`` from the end, of all of ``indices``; of none, a new one."""
    if not indices:
        return x.unsqueeze(axis)
    return x if len(indices) == 1 else x.flatten(axis - len(indices) + 1, axis)


def _split(x: Tensor, axis: int, indices: list[Index], sizes: dict[Index, Any]) -> Tensor:
    """Undo ``_merge``."""
    if not indices:
        return x.squeeze(axis)
    return x if len(indices) == 1 else x.unflatten(axis, [sizes[i] for i in indices])
