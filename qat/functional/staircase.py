"""The soft staircase: a tanh between every two neighbouring codes.

Source: Gong et al., "Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural
Networks", ICCV 2019, arXiv:1908.05033, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SOFTNESS = 1e-6


def steepness(softness: Tensor) -> Tensor:
    """Return ``k = log(2 / softness - 1)``, for which ``tanh(k / 2) = 1 - softness``.

    Args:
        softness: Between 0 and 1; held at a small positive bound. Shape ``()``.
    """
    return torch.log(2 / softness.clamp_min(MIN_SOFTNESS) - 1)


def staircase(steps: Tensor, softness: Tensor) -> Tensor:
    """Return ``i + (tanh(k (steps - i - 1/2)) / tanh(k / 2) + 1) / 2``, ``i = floor(steps)``.

    It goes through every code, and through the middle between two codes; its derivative is 1 on
    average, and largest in that middle.

    Args:
        steps: Real values divided by the scale. Shape ``(...)``.
        softness: Between 0, hard rounding, and 1, none. Shape ``()``.

    Example:
        >>> import torch
        >>> staircase(torch.tensor([1.0, 1.25, 1.5]), torch.tensor(0.01))
        tensor([1.0000, 1.0618, 1.5000])
    """
    k, code = steepness(softness), steps.detach().floor()
    return code + (torch.tanh(k * (steps - code - 0.5)) / torch.tanh(k / 2) + 1) / 2
