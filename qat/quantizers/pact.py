"""PACT: activations are clipped at a value that is a parameter.

Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
2018, arXiv:1805.06085, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.functional.affine import MIN_SCALE, dequantize, expand
from qat.functional.ste import clamp_min_ste, replace_value
from qat.quantizers.base import Quantizer
from qat.spec import QuantSpec


class PACT(Quantizer):
    """Clip to 0 and the learned ``clip``, and fake-quantize; the scale is ``clip / qmax``.

    ``clip`` receives gradient 1 where ``x >= clip`` and 0 elsewhere, ``x`` gradient 1 in
    ``0 <= x < clip`` and 0 elsewhere. Rounding does not count. Weight decay pulls ``clip`` down.

    Args:
        spec: The number format: symmetric, one free scale.
        scale_shape: Shape of the clip.
        has_batch: True; weights are for another quantizer.

    Raises:
        SpecError: If the format is another one, or the site is a weight.

    Paper:
        Section 3; its ``alpha`` is the clip. Differs: signed formats, which the paper does not
        have, are clipped below at ``clip * qmin / qmax``, with that ratio as gradient; the clip
        starts where calibration saw the range end, and is held above a small positive bound.
    """

    decayed = ("learned_clip",)
    needs = "activations that are symmetric and not power_of_two"

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        self.learned_clip = nn.Parameter(torch.ones(scale_shape))

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        fits = super().fits(spec, has_batch=has_batch)
        return fits and has_batch and spec.symmetric and not spec.power_of_two

    @property
    def clip(self) -> Tensor:
        """The positive clip in use, real units; differentiable."""
        return clamp_min_ste(self.learned_clip, MIN_SCALE * self.spec.qmax)

    @property
    def scale(self) -> Tensor:
        """The positive scale in use, real units; differentiable."""
        return self.clip / self.spec.qmax

    @property
    def learns(self) -> bool:
        """True: gradients move the clip."""
        return True

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy the clip of positive ``scale`` values in, in place."""
        self.learned_clip.copy_(scale * self.spec.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        values = dequantize(self.codes(x), self.scale.detach(), self.zero_point)
        top = expand(self.clip, x.shape)
        bottom = top * (self.spec.qmin / self.spec.qmax)
        inside = torch.where(x < bottom, bottom, x.float())
        clipped = torch.where(x >= top, top, inside)
        return replace_value(values if self.spec.bits > 8 else values.to(x.dtype), clipped)
