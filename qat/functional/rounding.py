"""Soft rounding: how far up a value is rounded, as a function with a gradient.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv:2004.10568, section 3; the rectified sigmoid from Louizos et al., ICLR 2018, arXiv:1712.01312.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1
"""The sigmoid's range is stretched to these and clipped, so that it reaches 0 and 1."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return ``h(v) = clip(sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)`` (eq. 23), shape of ``v``.

    Args:
        v: What is learned. Shape ``(...)``.

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """Return the ``v`` whose ``rectified_sigmoid`` is ``h``, shape of ``h``.

    Args:
        h: From 0 to 1. Shape ``(...)``.
    """
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Return ``sum(1 - |2 h - 1| ** beta)`` (eq. 24), a scalar: 0 where all of ``h`` is 0 or 1.

    Args:
        h: How far up values are rounded, 0 to 1. Shape ``(...)``.
        beta: The higher, the flatter around 1/2, where ``h`` then moves freely.
    """
    return (1 - (2 * h - 1).abs() ** beta).sum()


def annealed_beta(progress: float, warm_up: float, first: float, last: float) -> float | None:
    """Return the penalty's ``beta``: half a cosine from ``first`` to ``last``, behind a warm-up.

    Args:
        progress: Share of the iterations that are done, 0 to 1.
        warm_up: Share of the iterations without a penalty, for which ``None`` is returned.
        first: Value behind the warm-up.
        last: Value at the end.
    """
    if progress < warm_up:
        return None
    done = (progress - warm_up) / (1 - warm_up)
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2
