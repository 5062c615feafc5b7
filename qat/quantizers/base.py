"""What every quantizer is: the owner of a scale and of the arithmetic that uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qat.functional.affine import quantize, scale_from_range
from qat.spec import QuantSpec


class Quantizer(nn.Module, ABC):
    """Own the scale and zero point of one site; their shapes are final from the start.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale, from ``spec.scale_shape``.
        has_batch: Whether axis 0 of what it sees counts samples (activations) or not (weights).
    """

    zero_point: Tensor
    is_dynamic = False
    """Whether every tensor brings scales of its own; ``scale`` then is only for people to see."""

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__()
        self.spec = spec
        self.has_batch = has_batch
        self.register_buffer("zero_point", torch.zeros(scale_shape))

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """The positive scale in use, real units."""

    @property
    @abstractmethod
    def learns(self) -> bool:
        """Whether gradients move the scale; otherwise the range that an observer sees does."""

    @abstractmethod
    def set_scale(self, scale: Tensor) -> None:
        """Copy positive ``scale`` values in, in place."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Copy in the scale and zero point that cover ``low`` to ``high``, real units."""
        scale, zero_point = scale_from_range(low, high, self.spec)
        self.set_scale(scale)
        self.zero_point.copy_(zero_point)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of real values ``x`` as float32, shape of ``x``."""
        return quantize(x, self.scale, self.zero_point, self.spec.qmin, self.spec.qmax)

    def extra_repr(self) -> str:
        """Show the format in a module's print-out."""
        return str(self.spec)
