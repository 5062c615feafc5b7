"""Uniform: a grid over the range that an observer saw.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, sections 2.1 and 3.
"""

from __future__ import annotations

from torch import Tensor

from qat.quantizers.grid import GridQuantizer
from qat.quantizers.scales import ObservedScale


class Uniform(ObservedScale, GridQuantizer):
    """Fake-quantize with a scale set from outside; gradients pass where nothing was clipped.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        rounding: As in ``GridQuantizer``; the paper's is ``nearest``.
        gradient: As in ``GridQuantizer``; the paper's is ``ste``.
    """

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return scale, zero point and gradient factor in use for real values ``x``."""
        del x
        scale, zero_point = self.observed_scale, self.zero_point
        if self.training:  # a shared site moves on to its next tensor before this one's backward
            scale, zero_point = scale.clone(), zero_point.clone()
        return scale, zero_point, 1.0
