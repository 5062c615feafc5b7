"""Unit range: known beforehand, whatever the data shows."""

from __future__ import annotations

from torch import Tensor

from qat.observers.base import MinMax


class UnitRange(MinMax):
    """Cover 0 to 1, whatever was seen: for what is a share by definition, such as a softmax."""

    follows = False

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(0, 1)``, shape of the scale."""
        return self.low * 0, self.high * 0 + 1  # NaN and infinity stay visible
