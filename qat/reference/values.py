"""What travels through a graph that runs on integers: codes, and results not yet rounded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.codecs import ActivationCodec
from qat.functional.dynamic import tensor_grid
from qat.spec import QuantSpec


class BroughtGrid(ActivationCodec):
    """The grid that one tensor brought with it: no other tensor has it.

    Args:
        site: The site's name.
        x: What is quantized there, real values. Shape ``(...)``.
        spec: The number format: unsigned, affine.
    """

    def __init__(self, site: str, x: Tensor, spec: QuantSpec) -> None:
        scale, zero_point = tensor_grid(x, spec.qmax)
        super().__init__(site, spec, scale, zero_point, spec.qmin, spec.qmax)


@dataclass(frozen=True)
class Codes:
    """A tensor on a grid, real values ``grid.scale * steps``.

    Attributes:
        steps: Stored codes less the zero point: integers as float32. Shape ``(...)``.
        grid: The quantize that made them.
    """

    steps: Tensor
    grid: ActivationCodec

    def real(self) -> Tensor:
        """Return the real values, shape of ``steps``."""
        return self.steps * self.grid.scale


class Pending(ABC):
    """A result that is not rounded yet: whoever reads it says onto which grid."""

    @abstractmethod
    def real(self) -> Tensor:
        """Return the real values, float32."""

    @abstractmethod
    def codes(self, grid: ActivationCodec) -> Tensor:
        """Return stored codes on ``grid``, rounded but not held in its range, float32."""


@dataclass(frozen=True)
class Accumulator(Pending):
    """Exact sums, real values ``sums * scale / count + shift``.

    Attributes:
        sums: Integers; float32 where that is exact, else float64. Shape ``(...)``.
        scale: Broadcasts against ``sums``.
        count: What an average divides by.
        bits: Width of the accumulator.
        shift: Real values added behind it, where no grid was known beforehand for a bias.
    """

    sums: Tensor
    scale: Tensor
    count: int = 1
    bits: int = 32
    shift: Tensor | None = None

    def real(self) -> Tensor:
        """Return the real values, shape of ``sums``."""
        products = self.sums.float() * (self.scale / self.count)
        return products if self.shift is None else products + self.shift

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Round once, behind one float32 multiplier for each channel, of sums cut to 24 bits."""
        if self.shift is not None:
            return (self.real() / grid.scale).round_().add_(grid.zero_point.float())
        multiplier = self.scale / (grid.scale * self.count)
        return (self.sums.float() * multiplier).round_().add_(grid.zero_point.float())


@dataclass(frozen=True)
class Sum(Pending):
    """The sum of two tensors that lie on grids of their own; their shapes broadcast."""

    a: Codes
    b: Codes

    def real(self) -> Tensor:
        """Return the real values."""
        return self.a.real() + self.b.real()

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Add stored codes by two fused multiply-adds, as vectorised integer kernels do.

        Where there are fewer pairs of codes than sums, each pair is added once.
        """
        counts = [2 ** (8 * x.grid.zero_point.itemsize) for x in (self.a, self.b)]
        a, b = (x.steps + x.grid.zero_point.float() for x in (self.a, self.b))
        if math.prod(counts) >= max(a.numel(), b.numel()):
            return self._add(a, b, grid)
        rows, columns = (torch.arange(n, dtype=torch.float32, device=a.device) for n in counts)
        table = self._add(rows[:, None], columns, grid).flatten()
        pairs = torch.add(b, a, alpha=counts[1]).int()
        return table.index_select(0, pairs.flatten()).view(pairs.shape)

    def _add(self, a: Tensor, b: Tensor, grid: ActivationCodec) -> Tensor:
        (ratio_a, zero_a), (ratio_b, zero_b) = (_factor(x, grid) for x in (self.a, self.b))
        offset = grid.zero_point.float() - _fused(zero_a, ratio_a, zero_b * ratio_b)
        return _fused(a, ratio_a, _fused(b, ratio_b, offset)).round()


@dataclass(frozen=True)
class Product(Pending):
    """The product of two tensors that lie on grids of their own; their shapes broadcast."""

    a: Codes
    b: Codes

    def real(self) -> Tensor:
        """Return the real values."""
        return self.a.real() * self.b.real()

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Round behind the zero point, as the kernels do: a tie goes to the even stored code."""
        multiplier = self.a.grid.scale * self.b.grid.scale / grid.scale
        return (self.a.steps * self.b.steps * multiplier + grid.zero_point.float()).round()


@dataclass(frozen=True)
class Affine(Pending):
    """Codes multiplied and moved channel by channel: a batch-norm that no layer could take.

    Attributes:
        steps: Integers. Shape ``(...)``.
        gain: Real value of one step; broadcasts against ``steps``.
        shift: Real value that is added; broadcasts against ``steps``.
    """

    steps: Tensor
    gain: Tensor
    shift: Tensor

    def real(self) -> Tensor:
        """Return the real values, shape of ``steps``."""
        return self.steps * self.gain + self.shift

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Round behind the zero point."""
        return (self.real() / grid.scale + grid.zero_point.float()).round()


@dataclass(frozen=True)
class Average(Pending):
    """Averages of windows of codes, which kernels sum up in float.

    Attributes:
        values: Real values. Shape ``(...)``.
    """

    values: Tensor

    def real(self) -> Tensor:
        """Return the real values, shape of ``values``."""
        return self.values

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Round behind the zero point, as the kernels do: a tie goes to the even stored code."""
        return (self.values / grid.scale + grid.zero_point.float()).round()


@dataclass(frozen=True)
class Clipped(Pending):
    """A result held in the range ``low..high`` of real values, such as behind a ReLU."""

    source: Pending
    low: float
    high: float

    def real(self) -> Tensor:
        """Return the real values."""
        return self.source.real().clamp(self.low, self.high)

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Clip codes instead of values: rounding is monotone, so that is the same."""
        return self.clip_(self.source.codes(grid), grid)

    def clip_(self, codes: Tensor, grid: ActivationCodec) -> Tensor:
        """Hold stored ``codes`` on ``grid`` in the range, as stored codes, in place."""
        low, high = (
            float((torch.tensor(end) / grid.scale.cpu()).round() + grid.zero_point.cpu())
            for end in (self.low, self.high)
        )
        return codes.clamp_(low, high)


def _factor(x: Codes, grid: ActivationCodec) -> tuple[Tensor, Tensor]:
    """Return the ratio of two scales, and the zero point."""
    return x.grid.scale / grid.scale, x.grid.zero_point.float()


def _fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``x * y + z`` in float32 with a single rounding."""
    return (x.double() * y.double() + z.double()).float()
