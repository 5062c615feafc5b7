"""What every quantizer is: the owner of a scale and of the arithmetic that uses it."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.errors import SpecError
from qat.functional.affine import quantize, scale_from_range
from qat.functional.fused import Grid
from qat.spec import QuantSpec


class Deployable(enum.StrEnum):
    """In what form a chip or a runtime can have what a quantizer computes."""

    INTEGERS = "integers"
    """A code is the rounded quotient of value and scale: QuantizeLinear."""
    TABLE = "table"
    """Codes are integers, but they are looked up: weights are stored, activations compared."""
    SIMULATION = "simulation"
    """No integer form; what is trained is only a study."""


class Quantizer(nn.Module, ABC):
    """Own the scale and zero point of one site; their shapes are final from the start.

    Real values are ``scale * (code - zero_point)``, with codes in the format ``code_spec``.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale, from ``spec.scale_shape``.
        has_batch: Whether axis 0 of what it sees counts samples (activations) or not (weights).

    Raises:
        SpecError: If the quantizer does not have that format, or is not for such a site.
    """

    zero_point: Tensor
    is_dynamic: ClassVar[bool] = False
    """Whether every tensor brings scales of its own; ``scale`` then is only for people to see."""
    has_fixed_bits: ClassVar[bool] = False
    """Whether the shapes of its parameters depend on the bits, so that they cannot change."""
    deployable: ClassVar[Deployable] = Deployable.INTEGERS
    decayed: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that weight decay is part of the method for."""
    needs: ClassVar[str] = "formats of 2 bits or more, or unsigned ones"
    """What it is for, in words."""

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__()
        self.has_batch = has_batch
        self.spec = self._checked(spec)
        self.make_zero_point(scale_shape)

    def _checked(self, spec: QuantSpec) -> QuantSpec:
        if self.fits(spec, has_batch=self.has_batch):
            return spec
        raise SpecError(
            f"expected the quantizer {type(self).__name__} on {self.needs}, got "
            f"{'an activation' if self.has_batch else 'a weight'} in {spec}: "
            "correct the format, or choose another quantizer."
        )

    def use_bits(self, bits: int) -> None:
        """Change the width of the format; scales stay, and mean nothing until a range is set.

        Raises:
            SpecError: If the quantizer does not have that width, or has one for life.
        """
        if self.has_fixed_bits:
            raise SpecError(
                f"expected a quantizer whose bits can change, got {type(self).__name__}, whose "
                "parameters depend on them: remove schedule.bits, or choose another quantizer."
            )
        self.spec = self._checked(replace(self.spec, bits=bits))

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        del has_batch
        return spec.bits > 1 or not spec.signed

    @classmethod
    def code_format(cls, spec: QuantSpec) -> QuantSpec:
        """Return the format of the codes: wider than ``spec`` where they leave out values."""
        return spec

    @property
    def code_spec(self) -> QuantSpec:
        """The format of the codes."""
        return self.code_format(self.spec)

    def make_zero_point(self, scale_shape: tuple[int, ...]) -> None:
        """Create what ``zero_point`` is read from; a learned one has a parameter instead."""
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

    def grid_of(self, x: Tensor) -> Grid | None:
        """Return the grid for fused kernels; ``None`` if this does more than round to nearest.

        Args:
            x: A tensor of the shape that would pass.
        """
        del x
        return None

    def follow(self, x: Tensor) -> None:
        """Take what the scale is made of, beyond a range, from a tensor; nothing is, here.

        Args:
            x: Real values, as they pass in training until scales are frozen. Shape ``(...)``.
        """

    def anneal(self, progress: float) -> None:
        """Sharpen what is soft in training; nothing is, here.

        Args:
            progress: Share of the quantized part of the run that is done, 0 to 1.
        """

    def extra_repr(self) -> str:
        """Show the format in a module's print-out."""
        return str(self.spec)
