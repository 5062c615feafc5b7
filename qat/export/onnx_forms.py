"""ONNX forms of operations of torch that its exporter has none for, or one that is not valid."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import opset21

op: Any = opset21
_OPTIONS = (
    *("scale_grad_by_freq", "mode", "sparse", "per_sample_weights", "include_last_offset"),
    "padding_idx",
)
"""Arguments of ``embedding_bag`` behind the offsets."""


def _random_relu(
    x: Any, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, *rest: Any, **named: Any
) -> Any:
    """Return a leaky ReLU of the mean slope, which it is in evaluation."""
    del rest, named
    return op.LeakyRelu(x, alpha=(lower + upper) / 2), noise


def _embedding_bag(weight: Any, indices: Any, offsets: Any, *options: Any) -> Any:
    """Return sums, means or maxima over bags of one size, as rows of a matrix of indices are.

    Raises:
        NotImplementedError: If the bags have several sizes, or entries that do not count.
    """
    given = dict(zip(_OPTIONS, options, strict=False))
    mode, factors, padding = (given.get(k) for k in ("mode", "per_sample_weights", "padding_idx"))
    size = _bag_size(indices.shape[0], offsets.shape[0])
    counts_less = given.get("include_last_offset") or (padding is not None and padding >= 0)
    if size is None or counts_less:
        raise NotImplementedError("bags of several sizes, or with a padding index")
    bags = op.Constant(value_ints=[-1, size])
    rows = op.Gather(weight, op.Reshape(indices, bags))
    if factors is not None:
        factors = op.Unsqueeze(op.Reshape(factors, bags), op.Constant(value_ints=[2]))
        rows = op.Mul(rows, factors)
    reduce = (op.ReduceSum, op.ReduceMean, op.ReduceMax)[mode or 0]
    values = reduce(rows, op.Constant(value_ints=[1]), keepdims=0)
    return values, offsets, offsets, offsets  # the others are for the backward


def _bag_size(entries: Any, bags: Any) -> int | None:
    """Return the whole number that the symbolic size ``bags`` is multiplied by in ``entries``."""
    factor, star, rest = str(entries).partition("*")
    return int(factor) if star and factor.isdigit() and rest == str(bags) else None


FORMS: dict[Any, Any] = {
    torch.ops.aten.rrelu_with_noise_functional.default: _random_relu,
    torch.ops.aten.embedding_bag.padding_idx: _embedding_bag,
}
"""Operation to what it is in ONNX."""
