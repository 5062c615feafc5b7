"""Who moves a scale: gradients, or what an observer sees. Quantizers inherit one of the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.affine import MIN_SCALE
from qat.functional.ste import power_of_two, replace_value
from qat.quantizers.base import Quantizer
from qat.spec import QuantSpec


class LearnedScale(Quantizer):
    """A scale that is a parameter, held above a small positive bound.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        **options: What the next class takes.
    """

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool, **options: Any
    ) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch, **options)
        self.learned_scale = nn.Parameter(torch.ones(scale_shape))

    @property
    def scale(self) -> Tensor:
        """The positive scale in use, real units; differentiable."""
        return replace_value(self.held_scale, self.learned_scale)

    @property
    def held_scale(self) -> Tensor:
        """The same without history; the parameter has its gradient."""
        scale = self.learned_scale.detach().clamp_min(MIN_SCALE)
        return power_of_two(scale) if self.spec.power_of_two else scale

    @property
    def learns(self) -> bool:
        """True: gradients move the scale."""
        return True

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy positive ``scale`` values in, in place."""
        self.learned_scale.copy_(scale)


class ObservedScale(Quantizer):
    """A scale that is a buffer, set from outside.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        **options: What the next class takes.
    """

    observed_scale: Tensor

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool, **options: Any
    ) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch, **options)
        self.register_buffer("observed_scale", torch.ones(scale_shape))

    @property
    def scale(self) -> Tensor:
        """The scale in use, real units, shape as constructed."""
        return self.observed_scale

    @property
    def learns(self) -> bool:
        """False: the observer moves the scale."""
        return False

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy positive ``scale`` values in, in place."""
        self.observed_scale.copy_(scale)
