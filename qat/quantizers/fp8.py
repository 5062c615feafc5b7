"""Floats of 8 bits with a scale: e4m3 or e5m2.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from qat.quantizers.scaled_float import ScaledFloat
from qat.quantizers.simulated import float_format
from qat.spec import QuantSpec


class FP8(ScaledFloat):
    """Round to 8-bit floats; the observed range maps to the largest number.

    Differs from the paper: values saturate, and a scale may also be per channel or group.

    Args:
        spec: 8 bits, symmetric.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        format: ``e4m3`` (largest 448) or ``e5m2`` (largest 57344).

    Raises:
        SpecError: If bits or format are others.
    """

    widths = (8,)
    needs = "symmetric formats of 8 bits, not power_of_two"

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        format: str = "e4m3",
    ) -> None:
        form = float_format(format, {"e4m3": "e4m3", "e5m2": "e5m2"})
        super().__init__(spec, scale_shape, has_batch=has_batch, form=form)
