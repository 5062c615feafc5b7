"""NVFP4: blocks of 16 four-bit floats with an e4m3 scale, and one float32 scale for the tensor.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, arXiv:2509.25149.
"""

from __future__ import annotations

from torch import Tensor

from qat.functional.block_formats import nvfp4
from qat.functional.float_formats import FLOAT_FORMATS
from qat.quantizers.block_float import BlockFloat
from qat.spec import QuantSpec


class NVFP4(BlockFloat):
    """Round to NVFP4; the samples of a batch share the tensor's scale, ``amax / (6 * 448)``.

    Differs from the paper: rounding is to nearest, gradients are not quantized, and weights have
    blocks along one axis, not in squares. A block's scale is at least the smallest e4m3 number.

    Args:
        spec: 4 bits, symmetric.
        scale_shape: Shape of the calibrated scale.
        has_batch: Whether axis 0 of what it sees counts samples.

    Raises:
        SpecError: If the format is another one.
    """

    widths = (4,)
    needs = "symmetric formats of 4 bits, not power_of_two"

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        form = FLOAT_FORMATS["e2m1"]
        super().__init__(spec, scale_shape, has_batch=has_batch, form=form)

    def round_rows(self, rows: Tensor) -> Tensor:
        """Round real values, float32, in blocks along the last axis; the same shape.

        Args:
            rows: Shape ``(..., L)``.
        """
        return nvfp4(rows)
