"""Mean magnitude: where LSQ starts to learn.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.observers.base import MinMax, num_ranks, sum_over_ranks
from qat.spec import QuantSpec


class MeanMagnitude(MinMax):
    """Give the range whose scale is LSQ's initial one, ``2 * mean(|x|) / sqrt(qmax)``.

    Source: Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, section 2.1.

    Args:
        spec: The number format that the range is for.
        scale_shape: Shape of the scale.
    """

    follows = False

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...]) -> None:
        super().__init__(spec, scale_shape)
        self._sum, self._count = 0.0, 0

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self._sum, self._count = 0.0, 0

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        super()._update(rows, low, high)
        self._sum = self._sum + sum_over_ranks(rows.abs().sum(1)).view_as(self.low)
        self._count += rows.shape[1] * num_ranks()

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._count == 0:
            return self.low, self.high
        scale = torch.as_tensor(self._sum * (2 / self._count / self.spec.qmax**0.5))
        if self.spec.symmetric:
            return scale * self.spec.qmin, scale * self.spec.qmax
        shift = self.low.clamp(max=0)
        return shift, shift + scale * (self.spec.qmax - self.spec.qmin)
