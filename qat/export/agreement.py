"""How far two forms of a model agree: in predictions, in every output, and in being right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.outputs import named_tensors

Z_95 = 1.959964


@dataclass(frozen=True)
class OutputDifference:
    """How one output of a form of the model differs from the fold stage's, on a sample.

    Attributes:
        output: Its name.
        kind: The form of the model.
        agreement: Share of values within 1 % of the output's range; of integers, equal ones.
        largest: Largest difference, in 1/255 of the range.
    """

    output: str
    kind: str
    agreement: float
    largest: float


class Interval(NamedTuple):
    """A difference in percentage points, and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def paired_interval(reference: Tensor, other: Tensor) -> Interval:
    """Return how much more often ``other`` is right than ``reference``, in percentage points.

    Both judge the same samples, so only those count on which they differ; half a sample is added
    to each of the four cases, so that no difference seen is not taken for certainty.

    Args:
        reference: Whether each prediction is right, ``(N,)``.
        other: The same of the other model.

    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24 (2005), section 2 (the Wald interval plus 2).
    """
    gained = (other & ~reference).double().sum().item() + 0.5
    lost = (reference & ~other).double().sum().item() + 0.5
    count = len(reference) + 2
    middle = (gained - lost) / count
    spread = math.sqrt(max(gained + lost - count * middle**2, 0.0)) / count
    value = (gained - lost) / max(len(reference), 1)
    return Interval(*(100 * v for v in (value, middle - Z_95 * spread, middle + Z_95 * spread)))


def compare_outputs(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the share of equal predictions, and the largest difference in 1/255 of the range.

    Logits that are not finite predict nothing, so they never agree.

    Args:
        reference: Logits ``(N, K)``.
        other: Logits ``(N, K)``.
    """
    finite = (reference.isfinite() & other.isfinite()).all(1)
    agreement = ((reference.argmax(1) == other.argmax(1)) & finite).double().mean().item()
    step = (reference.max() - reference.min()).clamp_min(1e-12) / 255
    return agreement, ((reference - other).abs().max() / step).item()


def compare_trees(kind: str, reference: Any, other: Any) -> list[OutputDifference]:
    """Compare all tensors of what two forms of a model return.

    Args:
        kind: What the other form is called.
        reference: What the fold stage returns.
        other: What the other form returns, in dictionaries and tuples.
    """
    ours, theirs = named_tensors(reference), named_tensors(other)
    return [
        OutputDifference(name, kind, *compare_values(x, theirs.get(name)))
        for name, x in ours.items()
    ]


def compare_values(reference: Tensor, other: Tensor | None) -> tuple[float, float]:
    """Return the share of values that agree, and the largest difference in 1/255 of the range.

    Args:
        reference: An output, any shape and type; infinite and NaN agree with the same.
        other: The same of another form of the model, if it has it.
    """
    if other is None or other.shape != reference.shape:
        return 0.0, math.inf
    if reference.numel() == 0:
        return 1.0, 0.0
    a, b = reference.double(), other.double()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a[a.isfinite()]
    spread = float(finite.max() - finite.min()) if finite.numel() else 0.0
    gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
    near = gap <= (spread / 100 if reference.is_floating_point() else 0.0)
    return near.double().mean().item(), float(gap.max()) / max(spread, 1e-12) * 255
