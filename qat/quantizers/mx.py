"""MX: blocks of 32 small floats that share a power of two.

Source: OCP Microscaling Formats (MX) Specification v1.0; Rouhani et al., "Microscaling Data
Formats for Deep Learning", 2023, arXiv:2310.10537.
"""

from __future__ import annotations

from torch import Tensor

from qat.functional.block_formats import mx
from qat.quantizers.block_float import BlockFloat
from qat.quantizers.simulated import float_format
from qat.spec import QuantSpec

FORMATS = {
    "fp8_e4m3": "e4m3",
    "fp8_e5m2": "e5m2",
    "fp6_e3m2": "e3m2",
    "fp6_e2m3": "e2m3",
    "fp4": "e2m1",
}


class MX(BlockFloat):
    """Round to a Microscaling format; a block's scale is ``2 ** (floor(log2(amax)) - emax)``.

    A block with a NaN or an infinity becomes NaN. Differs from the specification: scales end at
    2**-126, the smallest normal float32. MXINT8 is left out.

    Args:
        spec: ``bits`` is the width of an element, 4, 6 or 8; symmetric.
        scale_shape: Shape of the calibrated scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        format: Of the elements: ``fp8_e4m3``, ``fp8_e5m2``, ``fp6_e3m2``, ``fp6_e2m3`` or ``fp4``.

    Raises:
        SpecError: If bits and format do not fit.
    """

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        format: str = "fp4",
    ) -> None:
        form = float_format(format, FORMATS)
        super().__init__(spec, scale_shape, has_batch=has_batch, form=form)

    def round_rows(self, rows: Tensor) -> Tensor:
        """Round real values, float32, in blocks along the last axis; the same shape.

        Args:
            rows: Shape ``(..., L)``.
        """
        return mx(rows, self.form)
