"""Binary: only the sign is left of a weight or an activation.

Source: Rastegari et al., "XNOR-Net", ECCV 2016, arXiv:1603.05279.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qat.functional.affine import MIN_SCALE, mean_to
from qat.functional.ste import clamp_min_ste, power_of_two
from qat.quantizers.table import TableQuantizer
from qat.spec import QuantSpec


class Binary(TableQuantizer):
    """Give ``sign(x)`` times a scale: codes -1 and 1; without a sign 0 and 1, parted at one half.

    The scale of a weight is its mean magnitude, which follows it in training until scales are
    frozen; a range does not tell it. That of an activation starts from its range and is learned.
    0 has the code 1, so a pruned weight does not stay 0.

    Args:
        spec: The number format: 1 bit, symmetric; of a weight signed.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.

    Raises:
        SpecError: If the format is another one.

    Paper:
        Section 3.1: the scale that is best for given weights, and the gradient of a sign, 1 up to a
        magnitude of 1, else 0. Differs: 1 is one scale here, so that the units of a layer do not
        matter; no gradient through the mean; one learned scale for an activation, where the paper
        has one for each place of an image, which is not known before the image is.
    """

    needs = "symmetric formats of 1 bit; weights have a sign"
    raw_scale: Tensor
    thresholds: Tensor
    levels: Tensor

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        if has_batch:
            self.raw_scale = nn.Parameter(torch.ones(scale_shape))
        else:
            self.register_buffer("raw_scale", torch.ones(scale_shape))
        low = -1.0 if spec.signed else 0.0
        self.register_buffer("levels", torch.tensor([low, 1.0]), persistent=False)
        self.register_buffer("thresholds", torch.tensor([(low + 1) / 2]), persistent=False)

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        return spec.bits == 1 and spec.symmetric and (has_batch or spec.signed)

    @classmethod
    def code_format(cls, spec: QuantSpec) -> QuantSpec:
        """Return the integers that hold the codes: 2 bits, narrow, where there is a sign."""
        return replace(spec, bits=2, narrow=True) if spec.signed else spec

    @property
    def scale(self) -> Tensor:
        """The positive scale in use, real units; differentiable."""
        # A copy: a layer used twice in one step moves the buffer in between.
        scale = clamp_min_ste(self.raw_scale.clone(), MIN_SCALE)
        return power_of_two(scale) if self.spec.power_of_two else scale

    @property
    def learns(self) -> bool:
        """Whether gradients move the scale: those of activations, alone."""
        return self.has_batch

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy positive ``scale`` values in, in place."""
        self.raw_scale.copy_(scale)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Start the scale of an activation where the larger code covers the range."""
        if self.has_batch:
            super().set_range(low, high)

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Take the scale of a weight from its real values ``x``."""
        if not self.has_batch:
            self.set_scale(mean_to(x.detach().float().abs(), self.raw_scale.shape))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the threshold ``(1,)``, in steps, and the two codes ``(2,)``."""
        return self.thresholds, self.levels

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        codes = self.codes(x)
        return self.snap(x, codes, self.clipped(x, codes))
