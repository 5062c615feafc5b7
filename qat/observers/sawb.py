"""Statistics-aware weight binning: a range from two moments of the values, without a search.

Source: Choi et al., "Bridging the Accuracy Gap for 2-bit Quantized Neural Networks (QNN)", 2018,
arXiv:1807.06964: the range with the least mean square error is close to a linear function of
``sqrt(E[x^2])`` and ``E|x|``, fitted on six distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import SpecError
from qat.observers.base import MinMax, num_ranks, sum_over_ranks
from qat.spec import QuantSpec

COEFFICIENTS = {
    1: (2.5318, 1.6109),
    3: (6.9426, 6.3045),
    7: (11.8232, 11.8587),
    15: (16.9282, 17.8110),
    31: (22.1813, 24.0041),
    63: (27.5480, 30.3671),
    127: (33.0099, 36.8645),
    255: (38.5666, 43.4884),
}
"""Highest code to ``(c1, c2)``.

Not the paper's figures, which are for grids without a code for 0 (of 2 bits, -1, -1/3, 1/3, 1),
but fitted in its way for codes ``-qmax .. qmax``: least squares over the best ranges for the
normal, uniform, Laplace, logistic, triangular and von Mises distributions (the last with
concentration 1, our choice). The worst of the six best ranges is missed by 3 percent for qmax 1
and 3, by 11 for 7, 22 for 15, and 58 for 127: a fit for few bits.
"""


class StatisticsAware(MinMax):
    """Cover ``-alpha`` to ``alpha``, with ``alpha = c1 * sqrt(E[x^2]) - c2 * E|x|``.

    Differs from the paper: the range is held between ``E|x|`` and the largest magnitude seen, which
    the best one never leaves. Unsigned grids read the same formula, as the upper half of a signed
    one; affine grids get the range of a signed one of their width, cut to what was seen.

    Args:
        spec: The number format that the range is for, of at most 8 bits.
        scale_shape: Shape of the scale.

    Raises:
        SpecError: If there are no coefficients for the format.
    """

    follows = False

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...]) -> None:
        super().__init__(spec, scale_shape)
        if spec.bits > 8:
            raise SpecError(
                f"expected at most 8 bits for the observer sawb, got {spec}: "
                "it is fitted for few bits; choose min_max or mse."
            )
        levels = spec.qmax if spec.symmetric else 2 ** (spec.bits - 1) - 1
        self.coefficients = COEFFICIENTS[max(levels, 1)]
        self._sums, self._count = torch.zeros(()), 0

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self._sums, self._count = torch.zeros(()), 0

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        super()._update(rows, low, high)
        sums = torch.stack([rows.square().sum(1), rows.abs().sum(1)])
        self._sums = self._sums.to(rows.device) + sum_over_ranks(sums)
        self._count += rows.shape[1] * num_ranks()

    def range(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)`` in real units, shape of the scale."""
        if self._count == 0:
            return self.low, self.high
        square, magnitude = (self._sums / self._count).view(2, *self.low.shape)
        c1, c2 = self.coefficients
        widest = torch.maximum(self.low.abs(), self.high.abs())
        alpha = c1 * square.sqrt() - c2 * magnitude
        alpha = torch.minimum(torch.maximum(alpha, magnitude), widest)
        if self.spec.symmetric:
            return -alpha, alpha
        return torch.maximum(self.low, -alpha), torch.minimum(self.high, alpha)
