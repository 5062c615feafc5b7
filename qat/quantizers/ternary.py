"""Ternary weights: small ones are 0, all others have one magnitude.

Source: Li et al., "Ternary Weight Networks", 2016, arXiv:1605.04711.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from qat.functional.affine import MIN_SCALE, dequantize, expand, mean_to, reduce_to
from qat.functional.ste import power_of_two, replace_value
from qat.quantizers.base import Deployable
from qat.quantizers.scales import ObservedScale
from qat.spec import QuantSpec


class Ternary(ObservedScale):
    """Give ``sign(w)`` times a scale where ``|w|`` is above a cutoff, else 0; gradient 1.

    The cutoff is 0.7 times the mean magnitude, the scale the mean magnitude of what lies above it.
    Both follow the weight in training until scales are frozen; a range tells neither.

    Args:
        spec: The number format: 2 bits, signed, symmetric.
        scale_shape: Shape of the scale.
        has_batch: False; activations do not come whole.

    Raises:
        SpecError: If the format is another one, or the site is an activation.

    Paper:
        Section 2.2: the approximate threshold and the scale that is the best behind it. Differs:
        also one scale and cutoff for each channel or group, where the paper has those of a layer.
    """

    deployable = Deployable.TABLE
    needs = "weights with bits: 2, signed and symmetric"
    share: ClassVar[float] = 0.7
    cutoff: Tensor

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        self.register_buffer("cutoff", torch.full(scale_shape, 0.5))

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        return not has_batch and spec.bits == 2 and spec.signed and spec.symmetric

    @classmethod
    def code_format(cls, spec: QuantSpec) -> QuantSpec:
        """Return ``spec`` without its lowest code: -1, 0 and 1."""
        return replace(spec, narrow=True)

    @property
    def scale(self) -> Tensor:
        """The positive scale in use, real units."""
        scale = self.observed_scale.clone()  # a layer used twice in one step moves it in between
        return power_of_two(scale) if self.spec.power_of_two else scale

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Change nothing: the scale is made of means."""

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Take cutoff and scale from the weight ``x``, real values."""
        magnitudes, shape = x.detach().float().abs(), self.cutoff.shape
        self.cutoff.copy_(self.share * self.size(magnitudes))
        above = magnitudes > expand(self.cutoff, x.shape)
        total, count = reduce_to(magnitudes * above, shape), reduce_to(above.float(), shape)
        self.observed_scale.copy_((total / count.clamp_min(1)).clamp_min(MIN_SCALE))

    def size(self, magnitudes: Tensor) -> Tensor:
        """Return what the cutoff is a share of, shape of the scale."""
        return mean_to(magnitudes, self.cutoff.shape)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the codes -1, 0 and 1 of real values ``x`` as float32, shape of ``x``."""
        x = x.float()
        return x.sign() * (x.abs() > expand(self.cutoff, x.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        value = dequantize(self.codes(x), self.scale, self.zero_point)
        return replace_value(value.to(x.dtype), x)
