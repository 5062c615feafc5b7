"""DSQ: rounding is a soft staircase early in training, and hard at its end.

Source: Gong et al., "Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural
Networks", ICCV 2019, arXiv:1908.05033, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import SpecError
from qat.functional.affine import expand
from qat.functional.staircase import staircase
from qat.functional.ste import replace_value
from qat.quantizers.lsq import LSQ
from qat.spec import QuantSpec


class DSQ(LSQ):
    """In training, replace the steps of LSQ's grid by tanhs whose ``softness`` falls to 0.

    Soft, gradients of ``x`` and of the scale are those of the staircase; once ``softness`` is 0,
    and always in eval mode, output and gradients are LSQ's: hard rounding.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        start: Softness at the start, more than 0 and less than 1; near 1 nothing is rounded.
        sharp: Share of the quantized part of the run from where rounding is hard.

    Raises:
        SpecError: If ``start`` or ``sharp`` is out of range.

    Paper:
        Section 3; its ``alpha`` is the softness. Differs: the softness falls linearly instead of
        being learned, and is really 0 in the end; the forward pass is soft, too, while it is not
        0 (the paper rounds it); one learned scale as in LSQ instead of two learned ends.
    """

    softness: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        start: float = 0.2,
        sharp: float = 0.8,
    ) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        if not (0 < start < 1 and 0 < sharp <= 1):
            raise SpecError(
                f"expected 0 < start < 1 and 0 < sharp <= 1 for DSQ, got start={start}, "
                f"sharp={sharp}: correct the option."
            )
        self.start, self.sharp = start, sharp
        self.register_buffer("softness", torch.tensor(start))

    @torch.no_grad()
    def anneal(self, progress: float) -> None:
        """Set the softness: from ``start`` down to 0 at ``sharp``.

        Args:
            progress: Share of the quantized part of the run that is done, 0 to 1.
        """
        self.softness.fill_(self.start * max(0.0, 1 - progress / self.sharp))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        hard = super().forward(x)
        if not self.training:
            return hard
        # Both, and no branch on a value: a graphics card would have to be waited for.
        return torch.where(self.softness > 0, self._soft(x).to(hard.dtype), hard)

    def _soft(self, x: Tensor) -> Tensor:
        scale = replace_value(self.scale, self.scale * self.gradient_factor(x))
        scale, zero = expand(scale, x.shape), expand(self.zero_point, x.shape)
        lowest, highest = self.spec.qmin - zero, self.spec.qmax - zero
        steps = x.float() / scale
        soft = staircase(steps, self.softness)
        soft = torch.where(steps < lowest, lowest, torch.where(steps > highest, highest, soft))
        return soft * scale
