"""Dynamic: every token brings its own scale, computed from the tensor as it passes.

Source: int8 dynamic activations with int4 weights ("8da4w") of torchao,
https://github.com/pytorch/ao; per token as in Yao et al., "ZeroQuant", NeurIPS 2022,
arXiv:2206.01861, section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.affine import dequantize, quantize
from qat.functional.dynamic import token_scale
from qat.functional.ste import replace_value
from qat.quantizers.scales import ObservedScale
from qat.spec import QuantSpec


class Dynamic(ObservedScale):
    """Fake-quantize every row along the last axis with a scale of its own; gradient 1 everywhere.

    Nothing is learned, and nothing is ever clipped. What calibration sets is the widest range that
    the site has shown, for people to look at; no arithmetic uses it.

    Args:
        spec: The number format: symmetric, one free scale.
        scale_shape: Shape of the calibrated scale, ``()``.
        has_batch: True; weights do not change from input to input.

    Raises:
        SpecError: If the format is another one, or the site is a weight.
    """

    is_dynamic = True
    needs = "activations that are symmetric and not power_of_two"

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        fits = super().fits(spec, has_batch=has_batch)
        return fits and has_batch and spec.symmetric and not spec.power_of_two

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale, real units, and zero point that ``x`` brings; both broadcast to it.

        Args:
            x: Real values, float32. Shape ``(..., C)``.
        """
        return token_scale(x, self.spec.qmax), self.zero_point

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of real values ``x`` as float32, shape of ``x``."""
        return quantize(x, *self.grid(x.float()), self.spec.qmin, self.spec.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        values = x.detach().float()
        scale, zero_point = self.grid(values)
        codes = quantize(values, scale, zero_point, self.spec.qmin, self.spec.qmax)
        snapped = dequantize(codes, scale, zero_point)
        return replace_value(snapped if self.spec.bits > 8 else snapped.to(x.dtype), x)
