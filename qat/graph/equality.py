"""Equality of a captured model with the user's, in both modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qat.errors import GraphError
from qat.graph.captured import MODES, Captured


def check_equal(reference: nn.Module, captured: Captured, *, after: str) -> None:
    """Compare two models in both modes on the example, from the same random state.

    Args:
        reference: The user's model; training mode moves its statistics, so a throw-away copy.
        captured: The same model, captured, quantizers off; a throw-away copy too.
        after: What was done last, for the message.

    Raises:
        GraphError: If the outputs differ.
    """
    for mode in reversed(MODES):
        outputs = [run_seeded(model, captured, mode) for model in (reference, captured)]
        gap = difference(*outputs)
        if gap is None or gap > 1e-4:
            raise GraphError(
                f"expected the model to compute the same after {after}, got other outputs in "
                f"{mode} mode: its forward depends on something that tracing cannot see."
            )


def run_seeded(model: nn.Module, captured: Captured, mode: str) -> Any:
    """Return what ``model`` makes of the example in ``mode``, from a fixed random state."""
    model.train(mode == "train")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return captured.example.on_copies(model)


def difference(a: Any, b: Any) -> float | None:
    """Return the largest difference of two results, relative to the largest value of the first.

    ``None`` if they have other structures, shapes or plain values; NaN equals NaN.
    """
    (ours, tree), (theirs, other) = tree_flatten(a), tree_flatten(b)
    if tree != other:
        return None
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if not isinstance(x, Tensor):
            if x != y:
                return None
            continue
        if x.shape != y.shape:
            return None
        if x.numel():
            worst = max(worst, _gap(x, y))
    return worst


def _gap(x: Tensor, y: Tensor) -> float:
    a, b = (v.detach().double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30) for v in (x, y))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-6))
