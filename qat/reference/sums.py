"""Exact sums of products of integers, in float32 wherever that holds them, and made only once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.channels import channel_axis
from qat.reference.values import Codes
from qat.subclass import plain_twin

_EXACT = 2**24  # float32 holds every integer up to here
_PARTS = (1, 2, 4, 8)
_Piece = tuple[Tensor, Tensor]


class SharedSums:
    """Sums of one call of a model, for other forms of it that multiply the same.

    Args:
        source: What another form remembers of the same call; None to remember for others.
    """

    def __init__(self, source: SharedSums | None = None) -> None:
        self.source = source
        self.known: dict[str, list[tuple[list[Tensor], Tensor]]] = {}

    def get(self, name: str, factors: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """Return the sums of a layer: the source's, where every factor is equal, or new ones.

        Args:
            name: The layer's.
            factors: All that the sums depend on.
            make: Makes them.
        """
        for others, sums in self.source.known.get(name, []) if self.source else []:
            if len(others) == len(factors) and all(map(torch.equal, others, factors)):
                return sums
        sums = make()
        if self.source is None:
            self.known.setdefault(name, []).append((list(factors), sums))
        return sums


def exact_sums(layer: Any, weight: Tensor, bias: Tensor | None, x: Codes) -> Tensor:
    """Return what a layer adds up: float32 where that holds every partial sum, else float64.

    A wide layer is cut into groups of inputs that float32 holds, and these sums are added.

    Args:
        layer: A layer; its own parameters are not read.
        weight: Integers, float64, one for each of its weights.
        bias: Integers, if it has one.
        x: What it reads; padding adds zeros.
    """
    pieces = _exact_pieces(layer, weight, x)
    if not pieces:
        bias = None if bias is None else bias.double()
        return plain_twin(layer, weight=weight, bias=bias)(x.steps.double())
    reach = _reach(layer, weight, x) + (0.0 if bias is None else float(bias.abs().max()))
    if reach < _EXACT:
        bias = None if bias is None else bias.float()
        return plain_twin(layer, weight=weight.float(), bias=bias)(x.steps)
    sums: Any = 0
    for part, steps in pieces:
        sums = sums + plain_twin(layer, weight=part.float(), bias=None)(steps).double()
    return sums if bias is None else sums + bias.double().view(-1, *[1] * (weight.ndim - 2))


def _exact_pieces(layer: Any, weight: Tensor, x: Codes) -> list[_Piece]:
    """Return weights and inputs whose sums float32 holds; none where no cut is fine enough."""
    if x.steps.device.type != "cpu":
        return []  # GPUs choose inexact algorithms
    for parts in _PARTS if _can_be_cut(layer) else _PARTS[:1]:
        weights = weight.tensor_split(parts, 1) if parts > 1 else (weight,)
        if all(_reach(layer, part, x) < _EXACT for part in weights):
            axis = -1 if isinstance(layer, nn.Linear) else 1 - weight.ndim
            inputs = x.steps.tensor_split(parts, axis) if parts > 1 else (x.steps,)
            return [pair for pair in zip(weights, inputs, strict=True) if pair[0].numel()]
    return []


def _can_be_cut(layer: Any) -> bool:
    """Whether axis 1 of the weight is that of all inputs."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.groups == 1
    return isinstance(layer, nn.Linear)


def _reach(layer: Any, weight: Tensor, x: Codes) -> float:
    """Return the largest magnitude that a partial sum of any stored codes can have."""
    zero = float(x.grid.zero_point)
    low, high = -zero, 2.0 ** (8 * x.grid.zero_point.itemsize) - 1 - zero
    axis = channel_axis(layer)
    others = [a for a in range(weight.ndim) if a != axis]
    # a zero point is one of the codes, so low <= 0 <= high
    positive, negative = weight.clamp_min(0).sum(others), weight.clamp_max(0).sum(others)
    highest, lowest = positive * high + negative * low, positive * low + negative * high
    reach = torch.maximum(highest, -lowest)
    return float(reach.max()) if reach.numel() else 0.0
