"""Mean squared error: the range that loses least in the mean square."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.affine import dequantize, quantize, scale_from_range
from qat.observers.histogram import Histogram
from qat.spec import QuantSpec


class MeanSquaredError(Histogram):
    """Shrink the observed range until the quantization error is smallest in the mean square.

    Source: Choi et al., "Bridging the Accuracy Gap for 2-bit Quantized Neural Networks", 2018,
    arXiv:1807.06964, minimise the same error for weights; here by a grid search over ranges.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
        candidates: How many fractions of the full range to try.
    """

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], candidates: int = 80) -> None:
        super().__init__(spec, scale_shape)
        self.candidates = candidates

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._counts is None:
            return self.low, self.high
        low, high, centres = self.low.reshape(-1, 1), self.high.reshape(-1, 1), self._centres()
        best = torch.full_like(low, float("inf"))
        best_fraction = torch.ones_like(low)
        for fraction in torch.linspace(0.04, 1.0, self.candidates).tolist():
            scale, zero_point = scale_from_range(low * fraction, high * fraction, self.spec)
            codes = quantize(centres, scale, zero_point, self.spec.qmin, self.spec.qmax)
            miss = (dequantize(codes, scale, zero_point) - centres).square()
            error = (miss * self._counts).sum(1, keepdim=True)
            best_fraction = torch.where(error < best, fraction, best_fraction)
            best = torch.minimum(best, error)
        best_fraction = best_fraction.view_as(self.low)
        return self.low * best_fraction, self.high * best_fraction
