"""N2UQ: thresholds are learned, one by one; the levels behind them stay uniform.

Source: Liu et al., "Nonuniform-to-Uniform Quantization", CVPR 2022, arXiv:2111.14826.
Left out: the entropy-preserving regularisation of weights; weights have another quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.functional.affine import expand
from qat.functional.ste import clamp_min_ste
from qat.quantizers.scales import LearnedScale
from qat.quantizers.table import TableQuantizer
from qat.spec import QuantSpec

LEAST_WIDTH = 1e-3


class N2UQ(LearnedScale, TableQuantizer):
    """Fake-quantize activations with learned thresholds in front of consecutive codes.

    The line from ``start`` on is cut into one segment for each code but the lowest; the threshold
    of a code is the middle of its segment.

    Args:
        spec: The number format: symmetric, 1 to 8 bits, with a sign from 2 bits on.
        scale_shape: Shape of the scale, ``()``.
        has_batch: True; weights have another quantizer.

    Raises:
        SpecError: If the format is another one, or the site is a weight.

    Paper:
        Section 3.2 (generalised straight-through estimator): inside segment ``i`` of width ``a_i``
        the gradient is that of the line from code ``i - 1`` to code ``i``, for ``x``, for ``start``
        and for the widths; beyond both ends it is 0. Differs: input and output have one learned
        scale, where the paper has two; the widths make up for the other. Thresholds start as those
        of a uniform grid over the calibrated range. Codes may have a sign, which the paper's do not
        need. A value on a threshold goes up.
    """

    needs = "symmetric activations with 2 to 8 bits, or 1 bit without a sign"
    levels: Tensor

    has_fixed_bits = True

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        self.start = nn.Parameter(torch.tensor(float(spec.qmin)))
        self.widths = nn.Parameter(torch.ones(spec.qmax - spec.qmin))
        levels = torch.arange(spec.qmin, spec.qmax + 1.0)
        self.register_buffer("levels", levels, persistent=False)

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        fits = super().fits(spec, has_batch=has_batch)
        return fits and has_batch and spec.bits <= 8 and spec.symmetric and spec.axis is None

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Make a uniform grid over ``low`` to ``high``, real units; from 0 on without a sign."""
        super().set_range(low, high)
        self.start.fill_(self.spec.qmin)
        self.widths.fill_(1)

    def segments(self) -> tuple[Tensor, Tensor]:
        """Return where segments begin and how wide they are, in steps; one for each threshold."""
        widths = clamp_min_ste(self.widths, LEAST_WIDTH)
        return self.start + widths.cumsum(0) - widths, widths

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return ascending thresholds ``(n,)``, in steps, and the codes ``(n + 1,)``."""
        starts, widths = self.segments()
        return (starts + widths / 2).detach(), self.levels

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        codes, scale = self.codes(x), expand(self.scale, x.shape)
        return self.snap(x, codes, scale * codes + scale.detach() * self.line(self.steps(x)))

    def line(self, steps: Tensor) -> Tensor:
        """Return the expected code, a line in each segment and constant beyond; differentiable.

        Args:
            steps: In units of the scale. Shape ``(...)``.
        """
        starts, widths = self.segments()
        index = torch.bucketize(steps.detach(), starts.detach(), right=True) - 1
        beyond = steps.detach() >= (starts[-1] + widths[-1]).detach()
        index, outside = index.clamp_min(0), (index < 0) | beyond
        rising = (steps - starts[index]) / widths[index] + self.levels[index]
        ends = torch.where(beyond, self.levels[-1], self.levels[0])
        return torch.where(outside, ends, rising)
