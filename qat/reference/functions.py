"""Functions of codes without floats: look-up tables, and a softmax of integer exponentials.

What a function makes of each of at most 256 codes is a table of at most 256 codes, computed once,
in float, when the model is prepared for the chip; only the look-up runs there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.codecs import ActivationCodec
from qat.reference.values import Codes, Pending

EXP_BITS = 16
TABLE_BITS = 8
"""The widest codes that are looked up."""


def every_code(grid: ActivationCodec) -> Tensor:
    """Return the real values of all codes that the storage of ``grid`` can hold, ``(2**bits,)``."""
    codes = torch.arange(2 ** (8 * grid.zero_point.itemsize), device=grid.scale.device)
    return (codes.float() - grid.zero_point.float()) * grid.scale


@dataclass(frozen=True)
class Lookup(Pending):
    """A function of one code at a time.

    Attributes:
        x: Codes of at most 8 bits.
        function: Maps real values to real values, element by element.
    """

    x: Codes
    function: Callable[[Tensor], Tensor]

    def real(self) -> Tensor:
        """Return the real values of the function, shape of the codes."""
        return self.function(self.x.real())

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Look the codes up in a table made for ``grid``."""
        table = grid.codes(self.function(every_code(self.x.grid))).float()
        return table[(self.x.steps + self.x.grid.zero_point.float()).long()]


@dataclass(frozen=True)
class Shares(Pending):
    """The softmax of codes along one axis.

    Attributes:
        x: Codes of at most 8 bits.
        dim: The axis.
    """

    x: Codes
    dim: int

    def real(self) -> Tensor:
        """Return the real values, shape of the codes."""
        return self.x.real().softmax(self.dim)

    def codes(self, grid: ActivationCodec) -> Tensor:
        """Sum exponentials of 16 fraction bits up, and divide each by the sum, in integers.

        An exponential is looked up by its distance from the largest code, so that it is at most
        1; its last bit is ``2**-16``. The quotient is rounded, ties upwards.
        """
        steps = self.x.steps.long()
        distance = steps.amax(self.dim, keepdim=True) - steps
        span = torch.arange(2**TABLE_BITS, device=steps.device)
        table = ((-span * self.x.grid.scale).double().exp() * 2**EXP_BITS).round().long()
        powers = table[distance]
        total = powers.sum(self.dim, keepdim=True)
        per_unit = (2**EXP_BITS / grid.scale.double()).round().long()
        halves = 2 * powers * per_unit + (total << EXP_BITS)
        return (halves // (total << (EXP_BITS + 1)) + grid.zero_point.long()).float()
