"""How much of its grid a tensor uses."""

from __future__ import annotations

from torch import Tensor

from qat.spec import QuantSpec


def used_codes(codes: Tensor, spec: QuantSpec) -> float:
    """Return the share of the codes of ``spec`` that occur in ``codes``, 0 to 1.

    Args:
        codes: Integers inside the grid, any shape.
        spec: The format of the codes; a quantizer that leaves codes out never reaches 1.
    """
    return codes.unique().numel() / (spec.qmax - spec.qmin + 1)
