"""Floats of few bits with one scale for a tensor, a channel or a group."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.affine import expand
from qat.functional.float_formats import round_to_float
from qat.functional.ste import replace_value
from qat.quantizers.simulated import Simulated


class ScaledFloat(Simulated):
    """Round ``x / scale`` to a float format; gradient 1, but 0 where it saturates.

    Args:
        spec: ``bits`` is the width of the float format; symmetric.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        form: The float format of an element.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        scale = expand(self.observed_scale, x.shape)
        scaled = x.detach().float() / scale
        value = round_to_float(scaled, self.form) * scale
        inside = scaled.abs() <= self.form.largest
        return replace_value(value.to(x.dtype), torch.where(inside, x, 0))
