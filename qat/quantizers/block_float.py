"""Floats of few bits in blocks, each with a scale computed from the tensor as it passes."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from qat.functional.ste import replace_value
from qat.quantizers.simulated import Simulated


class BlockFloat(Simulated):
    """Round blocks along the axis that a layer sums over; gradient 1 everywhere.

    Blocks run along axis 1 of activations of rank 4 (channels) and along the last axis of others;
    along all axes but the first of weights, laid out as one. What does not fill a block is padded
    with zeros. The scale that calibration sets is for people to look at; no arithmetic uses it.
    """

    @abstractmethod
    def round_rows(self, rows: Tensor) -> Tensor:
        """Round real values, float32, in blocks along the last axis; the same shape.

        Args:
            rows: Shape ``(..., L)``.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        values = x.detach().float()
        if not self.has_batch:
            rows = values.flatten(1) if x.ndim > 1 else values
            rounded = self.round_rows(rows).reshape(x.shape)
        elif x.ndim == 4:
            rounded = self.round_rows(values.movedim(1, -1)).movedim(-1, 1)
        else:
            rounded = self.round_rows(values)
        return replace_value(rounded.to(x.dtype), x)
