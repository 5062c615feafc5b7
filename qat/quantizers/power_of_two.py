"""Power of two: every level but 0 is a power of two of a learned clipping threshold.

Source: Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation",
2016, arXiv:1603.01025. Levels are chosen by distance, as Zhou et al., "Incremental Network
Quantization", ICLR 2017, arXiv:1702.03044, do, not by the distance of logarithms. Left out: the
fixed threshold of both papers, and the groups of weights that the second one freezes in turn.
"""

from __future__ import annotations

from qat.quantizers.apot import APoT
from qat.spec import QuantSpec


class PowerOfTwo(APoT):
    """Clip at a learned threshold and project on 0 and its halves, quarters, eighths, ...

    A code is 0 or a power of two: signed formats of 2 to 4 bits have codes of 2, 4 and 8 bits,
    unsigned ones of 2 and 3 bits have codes of 3 and 7. The gradients are those of ``APoT``.

    Args:
        spec: The number format: symmetric, 2 to 4 bits, without a sign 2 or 3.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        normalise: As ``APoT`` has it.

    Raises:
        SpecError: If the format is another one, or ``normalise`` is for an activation.
    """

    needs = "symmetric formats of 2 to 4 bits, or 2 to 3 without a sign, whose codes 8 bits hold"
    widths = (range(2, 4), range(2, 5))

    @classmethod
    def magnitudes(cls, spec: QuantSpec) -> list[int]:
        """Return the codes of ``spec`` that are not negative, ascending."""
        return [0, *(2**i for i in range(2 ** (spec.bits - spec.signed) - 1))]
