"""Uniform: a grid over the range that an observer saw.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, sections 2.1 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.grid import GridQuantizer
from qat.spec import QuantSpec


class Uniform(GridQuantizer):
    """Fake-quantize with a scale set from outside; gradients pass where nothing was clipped.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        rounding: As in ``GridQuantizer``; the paper's is ``nearest``.
        gradient: As in ``GridQuantizer``; the paper's is ``ste``.
    """

    observed_scale: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        rounding: str = "nearest",
        gradient: str = "ste",
    ) -> None:
        super().__init__(
            spec, scale_shape, has_batch=has_batch, rounding=rounding, gradient=gradient
        )
        self.register_buffer("observed_scale", torch.ones(scale_shape))

    @property
    def scale(self) -> Tensor:
        """The scale in use, real units, shape as constructed."""
        return self.observed_scale

    @property
    def learns(self) -> bool:
        """False: the observer moves the scale."""
        return False

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy positive ``scale`` values in, in place."""
        self.observed_scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        scale, zero_point = self.observed_scale, self.zero_point
        if self.training:  # a shared site moves on to its next tensor before this one's backward
            scale, zero_point = scale.clone(), zero_point.clone()
        return self.snap(x, scale, zero_point)
