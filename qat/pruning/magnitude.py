"""Magnitude pruning: the smallest weights become zero, more of them as training goes on.

Source: Zhu and Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878 (the cubic schedule);
Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378 (N:M).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from qat.errors import ConfigError


def cubic_ratio(progress: float, final: float) -> float:
    """Return the share of weights to prune when ``progress`` (0 to 1) of the ramp is over.

    Source: Zhu and Gupta, eq. 1, from an initial ratio of 0.
    """
    progress = min(max(progress, 0.0), 1.0)
    return final * (1 - (1 - progress) ** 3)


def unstructured_mask(weight: Tensor, ratio: float) -> Tensor:
    """Return 1 where ``weight`` stays and 0 for its ``ratio`` smallest magnitudes, same shape.

    Args:
        weight: Real values, any shape.
        ratio: Share of the weights to prune, 0 to 1, rounded to whole weights.
    """
    mask = torch.ones(weight.numel(), device=weight.device)
    mask[weight.detach().abs().flatten().argsort()[: round(ratio * weight.numel())]] = 0
    return mask.view_as(weight)


def n_of_m_mask(weight: Tensor, zeros: int, group: int) -> Tensor:
    """Return a mask with the ``zeros`` smallest of every ``group`` inputs of an output at 0.

    Args:
        weight: Real values ``(O, I, ...)``; groups run along axis 1.
        zeros: Weights to prune in each group.
        group: Weights in a group; where it does not divide ``I`` nothing is pruned.
    """
    if weight.ndim < 2 or weight.shape[1] % group:
        return torch.ones_like(weight)
    rows = weight.detach().abs().movedim(1, -1)
    groups = rows.reshape(-1, group)
    mask = torch.ones_like(groups)
    mask.scatter_(1, groups.argsort(dim=1)[:, :zeros], 0.0)
    return mask.view(rows.shape).movedim(-1, 1).contiguous()


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return ``(kept, group)`` of a pattern such as ``"2:4"``, ``None`` for ``"unstructured"``.

    Raises:
        ConfigError: If it is neither.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ConfigError(
            f"expected pruning.pattern 'unstructured' or 'N:M' with N < M, got '{pattern}'."
        )
    return int(match[1]), int(match[2])


def prune_mask(weight: Tensor, ratio: float, pattern: str) -> Tensor:
    """Return the mask of ``weight`` at ``ratio``; an N:M pattern fills its groups step by step.

    Args:
        weight: Real values ``(O, I, ...)``.
        ratio: Share of the weights to prune, 0 to 1.
        pattern: ``"unstructured"``, or ``"N:M"``: N of M consecutive inputs stay.
    """
    shape = parse_pattern(pattern)
    if shape is None:
        return unstructured_mask(weight, ratio)
    kept, group = shape
    return n_of_m_mask(weight, min(int(ratio * group + 1e-6), group - kept), group)
