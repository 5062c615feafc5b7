"""Percentile: cover all but the outermost values."""

from __future__ import annotations

from torch import Tensor

from qat.errors import SpecError
from qat.kinds import number, require
from qat.observers.histogram import Histogram
from qat.spec import QuantSpec


class Percentile(Histogram):
    """Leave out the outermost values, ``100 - percentile`` percent of them in all.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
        percentile: Percentage of the values to cover.

    Raises:
        SpecError: If it is not above 0 and up to 100.
    """

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], percentile: float = 99.99
    ) -> None:
        super().__init__(spec, scale_shape)
        require("percentile", percentile, number(above=0, high=100), SpecError)
        self.tail = (1 - percentile / 100) / 2

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._counts is None:
            return self.low, self.high
        share = self._counts.cumsum(1) / self._counts.sum(1, keepdim=True)
        centres = self._centres()
        first = (share > self.tail).float().argmax(1, keepdim=True)
        last = (share >= 1 - self.tail).float().argmax(1, keepdim=True)
        low, high = centres.gather(1, first), centres.gather(1, last)
        return low.view_as(self.low), high.view_as(self.high)
