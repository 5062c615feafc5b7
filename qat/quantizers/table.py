"""Quantizers that look their codes up: ascending thresholds, and one code between each two."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from qat.functional.affine import dequantize, expand
from qat.functional.ste import replace_value
from qat.quantizers.base import Deployable, Quantizer

INFINITY_BITS = 0x7F800000
"""Float32 infinity as an integer; those of smaller magnitudes are in order below."""


class TableQuantizer(Quantizer):
    """Compare ``x / scale`` with thresholds; a value on a threshold belongs above it.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
    """

    deployable = Deployable.TABLE

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Return ascending thresholds ``(n,)``, in steps, and integer codes ``(n + 1,)``."""

    def steps(self, x: Tensor) -> Tensor:
        """Return real values ``x`` in units of the scale, float32; differentiable."""
        return x.float() / expand(self.scale, x.shape)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of real values ``x`` as float32, shape of ``x``."""
        thresholds, codes = self.grid()
        return codes[torch.bucketize(self.steps(x), thresholds, right=True)]

    @torch.no_grad()
    def table(self) -> tuple[Tensor, Tensor]:
        """Return the lookup of an activation: ``codes(x) == codes[number of thresholds <= x]``.

        Returns:
            Ascending thresholds ``(n,)``, in real units: exactly the lowest float32 of each code,
            and integer codes ``(n + 1,)``; both float32.
        """
        assert self.has_batch, "a weight's codes are stored, nothing looks them up"
        thresholds, codes = self.grid()
        return first_reaching(thresholds, self.scale), codes

    def clipped(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return a surrogate for ``snap``: straight through between the ends of the grid.

        ``x`` receives gradient 1 there, else 0; the scale receives ``code - steps`` there, else
        the code, as it does in LSQ.

        Args:
            x: Real values. Shape ``(...)``.
            codes: What ``codes(x)`` gave.
        """
        steps, scale, ends = self.steps(x).detach(), expand(self.scale, x.shape), self.grid()[1]
        inside = (steps >= ends[0]) & (steps <= ends[-1])
        return torch.where(inside, x.float() + scale * (codes - steps), scale * codes)

    def snap(self, x: Tensor, codes: Tensor, surrogate: Tensor) -> Tensor:
        """Return the real values of ``codes`` for ``x``, with the gradients of ``surrogate``.

        Args:
            x: Real values; their dtype comes out where it holds the codes. Shape ``(...)``.
            codes: What ``codes(x)`` gave.
            surrogate: What receives the gradients. float32, shape of ``x``.
        """
        value = replace_value(dequantize(codes, self.scale.detach(), self.zero_point), surrogate)
        return value if self.code_spec.bits > 8 else value.to(x.dtype)


def first_reaching(thresholds: Tensor, scale: Tensor) -> Tensor:
    """Return the lowest float32 ``x`` with ``x / scale >= threshold``, as float32 divides.

    Found by bisection over all floats: a quotient near a threshold rounds, near 0 it vanishes.

    Args:
        thresholds: Finite, in steps. Shape ``(n,)``.
        scale: Positive, real units. Shape ``()``.
    """
    high = torch.full(thresholds.shape, INFINITY_BITS, device=thresholds.device)
    low = -high
    for _ in range(33):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = _float_at(middle) / scale >= thresholds
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return _float_at(high)


def _float_at(place: Tensor) -> Tensor:
    """Return the float32 at ``place`` in the ascending order of all, with 0 at 0."""
    return place.abs().to(torch.int32).view(torch.float32) * place.sign()
