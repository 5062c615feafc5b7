"""Gradients of rounding other than straight through: functions that make an ``Estimator``.

An estimator gets the gradient of rounded values and how far those lay above their codes, in steps.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from qat.functional.fake_quantize import Estimator


def ewgs(delta: float, num_steps: int) -> Estimator:
    """Return the estimator ``g * (1 + delta * sign(g) * (x_n - x_q))``: EWGS.

    Values that have farther to go before they leave their code get more of it.

    Args:
        delta: How much the distance counts; 0 is straight through.
        num_steps: Steps from the lowest to the highest code, over which ``x_n`` goes from 0 to 1.

    Source: Lee et al., "Network Quantization with Element-wise Gradient Scaling", CVPR 2021,
    arXiv:2104.00903, section 3.

    Example:
        >>> import torch
        >>> above = torch.tensor([-0.5, 0.0, 0.5])
        >>> ewgs(0.3, 3)(torch.tensor([1.0, 1.0, -1.0]), above)
        tensor([ 0.9500,  1.0000, -0.9500])
    """
    return partial(_scale_by_distance, delta=delta / num_steps)


def _scale_by_distance(grad: Tensor, above: Tensor, *, delta: float) -> Tensor:
    return grad * (1 + delta * grad.sign() * above)


def dsq(softness: float) -> Estimator:
    """Return the estimator that has the slope of the soft staircase: DSQ with hard rounding.

    Values half way between two codes get most of the gradient, those on a code the least.

    Args:
        softness: Between 0 and 1; the less, the steeper. It stays, so this is no annealing.

    Source: Gong et al., "Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit
    Neural Networks", ICCV 2019, arXiv:1908.05033, section 3.
    """
    return partial(_slope_of_staircase, k=math.log(2 / softness - 1))


def _slope_of_staircase(grad: Tensor, above: Tensor, *, k: float) -> Tensor:
    from_middle = 0.5 - above.abs()
    return grad * (k / 2 / math.tanh(k / 2)) * (1 - (k * from_middle).tanh().square())
