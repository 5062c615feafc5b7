"""Straight-through estimators: functions whose forward value is exact and whose gradient is chosen.

Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons",
2013, arXiv:1308.3432. The usual detach tricks change forward values by an ulp when they scale;
these are ``autograd.Function`` instead, so training and export see the same number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _ReplaceValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0].to(ctx.dtype)


def replace_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return ``value`` exactly, and send its gradient to ``surrogate``.

    Args:
        value: What comes out. Shape ``(...)``.
        surrogate: What receives the gradient unchanged. Shape of ``value``.

    Example:
        >>> x = torch.tensor([0.3, 1.6], requires_grad=True)
        >>> replace_value(x.detach().round(), x).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    return _ReplaceValue.apply(value.detach(), surrogate)


def round_ste(x: Tensor) -> Tensor:
    """Round ``x`` half to even, with gradient 1. Shape ``(...)`` in and out."""
    return replace_value(x.detach().round(), x)


def clamp_min_ste(x: Tensor, lowest: float) -> Tensor:
    """Hold ``x`` at ``lowest`` or above, with gradient 1 so that it can come back up.

    Args:
        x: Real values. Shape ``(...)``.
        lowest: The least value to come out.
    """
    return replace_value(x.detach().clamp_min(lowest), x)


def power_of_two(scale: Tensor, *, up: bool = False) -> Tensor:
    """Return the power of two nearest to ``scale`` on a log axis, exactly, with gradient 1.

    Args:
        scale: Positive real values. Shape ``(...)``.
        up: Take the next power of two that is not smaller instead.
    """
    mantissa, _ = torch.frexp(scale.detach())  # in [0.5, 1), so the division is exact
    below = scale.detach() / (2 * mantissa)
    raised = mantissa > (0.5 if up else math.sqrt(0.5))
    return replace_value(torch.where(raised, below * 2, below), scale)
