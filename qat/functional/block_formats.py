"""Blocks of small floats that share a scale: Microscaling and NVFP4.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6.3; Rouhani et al.,
"Microscaling Data Formats for Deep Learning", 2023, arXiv:2310.10537; NVIDIA, "Pretraining Large
Language Models with NVFP4", 2025, arXiv:2509.25149.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from qat.functional.float_formats import (
    FLOAT_FORMATS,
    FloatFormat,
    floor_power_of_two,
    round_to_float,
)

MX_BLOCK, NVFP4_BLOCK = 32, 16
LEAST = 2.0**-126
"""Smallest normal float32; E8M0 goes to 2**-127, of which float32 has no exact arithmetic."""


def split_blocks(x: Tensor, size: int) -> Tensor:
    """Cut the last axis into blocks, the last of which is filled up with zeros.

    Args:
        x: Real values. Shape ``(..., L)``.
        size: Values in a block.

    Returns:
        Shape ``(..., ceil(L / size), size)``.
    """
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def join_blocks(blocks: Tensor, length: int) -> Tensor:
    """Undo ``split_blocks``.

    Args:
        blocks: Shape ``(..., B, size)``.
        length: The ``L`` that the last axis had.
    """
    return blocks.flatten(-2)[..., :length]


def mx_scales(blocks: Tensor, form: FloatFormat) -> Tensor:
    """Return one power of two for each block: ``2 ** (floor(log2(amax)) - max_exponent)``.

    Args:
        blocks: Real values, float32. Shape ``(..., B, size)``.
        form: Of the elements.

    Returns:
        Real units, shape ``(..., B, 1)``; the least normal float32 for blocks of zeros.
    """
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    return (floor_power_of_two(largest) * 2.0**-form.max_exponent).clamp_min(LEAST)


def mx(x: Tensor, form: FloatFormat) -> Tensor:
    """Round ``x`` to a Microscaling format with blocks of 32 along the last axis.

    The largest values of a block may lie above what the format holds; they saturate.

    Args:
        x: Real values, float32. Shape ``(..., L)``.
        form: Of the elements.
    """
    blocks = split_blocks(x, MX_BLOCK)
    scales = mx_scales(blocks, form)
    return join_blocks(round_to_float(blocks / scales, form) * scales, x.shape[-1])


def nvfp4_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of each block, itself an e4m3 number, and that of the tensor.

    Args:
        blocks: Real values, float32. Shape ``(..., B, size)``.

    Returns:
        Numbers of the format e4m3, shape ``(..., B, 1)``, at least its smallest positive one; and
        ``amax / (6 * 448)``, real units, shape ``()``.
    """
    element, scale = FLOAT_FORMATS["e2m1"], FLOAT_FORMATS["e4m3"]
    largest = blocks.abs().amax(-1, keepdim=True)
    tensor_scale = (largest.max() / (element.largest * scale.largest)).clamp_min(LEAST)
    block_scales = round_to_float(largest / element.largest / tensor_scale, scale)
    return block_scales.clamp_min(scale.smallest), tensor_scale


def nvfp4(x: Tensor) -> Tensor:
    """Round ``x`` to NVFP4 with blocks of 16 along the last axis.

    Args:
        x: Real values, float32. Shape ``(..., L)``.
    """
    blocks = split_blocks(x, NVFP4_BLOCK)
    block_scales, tensor_scale = nvfp4_scales(blocks)
    scales = block_scales * tensor_scale
    rounded = round_to_float(blocks / scales, FLOAT_FORMATS["e2m1"]) * scales
    return join_blocks(rounded, x.shape[-1])
