"""TQT: thresholds are learned on a log axis, and scales are powers of two.

Source: Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point
Inference of Deep Neural Networks", MLSys 2020, arXiv:1903.08066, section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.affine import MIN_SCALE, dequantize, expand, quantize, reduce_to
from qat.functional.ste import power_of_two
from qat.quantizers.base import Quantizer
from qat.spec import QuantSpec


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log2_threshold: Tensor, scale: Tensor, ends: tuple[int, int]
    ) -> Tensor:
        del log2_threshold  # the scale is made of it; only gradients go there
        ctx.save_for_backward(x, scale)
        ctx.ends = ends
        zero_point = torch.zeros_like(scale)
        dtype = torch.float32 if ends[1] - ends[0] > 255 else x.dtype
        return dequantize(quantize(x, scale, zero_point, *ends), scale, zero_point, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        qmin, qmax = ctx.ends
        grad, steps = grads[0].float(), x.float() / expand(scale, x.shape)
        nearest = steps.round()
        inside = (nearest >= qmin) & (nearest <= qmax)
        slope = torch.where(inside, nearest - steps, nearest.clamp(qmin, qmax))
        grad_log2 = reduce_to(grad * slope, scale.shape) * scale * math.log(2)
        return (grad * inside).to(x.dtype), grad_log2, None, None


class TQT(Quantizer):
    """Fake-quantize with the scale ``2 ** ceil(log2_threshold)``, divided by ``2 ** (bits - 1)``.

    By ``2 ** bits`` in unsigned formats. With ``v = x / scale``, ``log2_threshold`` receives
    ``scale * ln(2)`` times the sum of ``round(v) - v`` inside and of the end of the grid that
    clipped outside; ``x`` receives 1 inside, else 0. Inside is where ``round(v)`` is a code.

    Args:
        spec: The number format: symmetric. With ``power_of_two: true`` scales stay powers of two
            also behind a folded batch-norm.
        scale_shape: Shape of the threshold.
        has_batch: Whether axis 0 of what it sees counts samples.

    Raises:
        SpecError: If the format is affine.

    Paper:
        Section 3. Differs: also one threshold per channel or group; it starts at the largest
        magnitude of the range that an observer gives; scales are held at ``2 ** -26`` or above.
        The paper trains thresholds with Adam: sums over many elements are long for plain SGD.
    """

    needs = "symmetric formats of 2 bits or more, or unsigned ones"

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        self.log2_threshold = nn.Parameter(torch.zeros(scale_shape))

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        return super().fits(spec, has_batch=has_batch) and spec.symmetric

    @property
    def fraction_bits(self) -> int:
        """Binary digits of a code behind the threshold's."""
        return self.spec.bits - self.spec.signed

    @property
    @torch.no_grad()
    def scale(self) -> Tensor:
        """The scale in use, a power of two, real units; no gradient goes this way."""
        exponent = self.log2_threshold.ceil() - self.fraction_bits
        return power_of_two(torch.exp2(exponent.clamp_min(math.log2(MIN_SCALE))))

    @property
    def learns(self) -> bool:
        """True: gradients move the threshold."""
        return True

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy the thresholds of positive ``scale`` values in, in place."""
        self._set_threshold(scale * 2.0**self.fraction_bits)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Copy in the threshold of the range ``low`` to ``high``, real units."""
        self._set_threshold(torch.maximum(high, -low) if self.spec.signed else high)

    def _set_threshold(self, threshold: Tensor) -> None:
        lowest = MIN_SCALE * 2.0**self.fraction_bits
        self.log2_threshold.copy_(_log2(threshold.float().clamp_min(lowest)))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        ends = (self.spec.qmin, self.spec.qmax)
        return _FakeQuantize.apply(x, self.log2_threshold, self.scale, ends)


def _log2(x: Tensor) -> Tensor:
    """Return the logarithm of positive ``x``, whole for powers of two: their ceiling must be."""
    mantissa, exponent = torch.frexp(x)
    return exponent + mantissa.log2()
