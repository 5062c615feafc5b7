"""Stochastic rounding: up or down by chance, so that nothing is lost on average.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015,
arXiv:1502.02551, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(steps: Tensor) -> Tensor:
    """Round up with a probability that is the share above the lower whole number, else down.

    Whole numbers stay. The chance is that of PyTorch's default generator.

    Args:
        steps: Real values in steps. Shape ``(...)`` in and out.
    """
    lower = steps.floor()
    return lower + (torch.rand_like(steps) < steps - lower)
