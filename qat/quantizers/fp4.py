"""Floats of 4 bits with a scale: e2m1, the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

Source: the format is that of the OCP Microscaling Formats (MX) Specification v1.0, section 5.3.3;
4-bit floats with scales from calibration as in Liu et al., "LLM-FP4", EMNLP 2023,
arXiv:2310.16836, whose exponent biases are real scales here.
"""

from __future__ import annotations

from qat.functional.float_formats import FLOAT_FORMATS
from qat.quantizers.scaled_float import ScaledFloat
from qat.spec import QuantSpec


class FP4(ScaledFloat):
    """Round to 4-bit floats; the observed range maps to 6.

    Args:
        spec: 4 bits, symmetric.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.

    Raises:
        SpecError: If the format is another one.
    """

    widths = (4,)
    needs = "symmetric formats of 4 bits, not power_of_two"

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        form = FLOAT_FORMATS["e2m1"]
        super().__init__(spec, scale_shape, has_batch=has_batch, form=form)
