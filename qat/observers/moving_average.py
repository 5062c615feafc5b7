"""Moving average: the range of a stream of batches, which one outlier does not set."""

from __future__ import annotations

from torch import Tensor

from qat.observers.base import MinMax
from qat.spec import QuantSpec


class MovingAverage(MinMax):
    """Follow the range of each batch slowly: ``low += momentum * (batch's low - low)``.

    The first batch sets the range. Weights, which change a little every step, want ``MinMax``.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
        momentum: Share of the newest batch.
    """

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], momentum: float = 0.1
    ) -> None:
        super().__init__(spec, scale_shape)
        self.momentum = momentum

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.empty:
            super()._update(rows, low, high)
        else:
            self.low.lerp_(low, self.momentum)
            self.high.lerp_(high, self.momentum)
