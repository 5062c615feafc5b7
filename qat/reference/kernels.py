"""Integer kernels: layers, matrix products and pairs of codes, exact before they are rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.functional.affine import expand, quantize_bias
from qat.integer_layers import IntegerLayer
from qat.layers import QuantizedLayer
from qat.reference.sums import exact_sums
from qat.reference.values import Accumulator, BroughtGrid, Codes, Pending, Product, Sum
from qat.spec import QuantSpec
from qat.subclass import has_own_forward, original_class

Share = Callable[[Sequence[Tensor], Callable[[], Tensor]], Tensor]


def _make(factors: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
    del factors
    return make()


def has_integer_kernel(layer: Any, x: Codes, bits: int) -> bool:
    """Whether codes are multiplied: ``bits`` at most, and one scale for each accumulator."""
    if not isinstance(layer, QuantizedLayer | IntegerLayer):
        return False
    spec = layer.spec
    narrow = max(spec.bits, x.grid.spec.bits) <= bits and spec.group_size is None
    return narrow and not has_own_forward(original_class(layer))


def accumulate(layer: Any, x: Codes, share: Share = _make) -> Accumulator:
    """Multiply codes by a layer's codes and add its bias, exactly.

    A grid that a tensor brings has no bias on it: that one is added in float, as runtimes do.

    Args:
        layer: A quantized layer, or a converted one.
        x: What it reads.
        share: Returns the sums, given what they depend on and what makes them.
    """
    parts = layer.integers()
    scale, bias = x.grid.scale * _per_channel(parts.weight_scale), parts.bias
    shift = bias if isinstance(x.grid, BroughtGrid) else None
    if shift is not None:
        bias = None
    elif bias is not None and parts.bias_scale is None:  # called with several scales
        bias = quantize_bias(bias, scale)
    weight = parts.weight.double() - expand(parts.zero_point, parts.weight.shape)
    factors = [weight, x.grid.zero_point, x.steps, *([] if bias is None else [bias])]
    sums = share(factors, lambda: exact_sums(layer, weight, bias, x))
    if scale.numel() > 1:
        scale = scale.view(-1, *[1] * (weight.ndim - 2))
    return Accumulator(sums, scale, bits=_accumulator_bits(layer.spec, x.grid.spec), shift=shift)


def _multiply(a: Codes, b: Codes) -> Accumulator:
    """Multiply two matrices of codes, exactly."""
    sums = torch.matmul(a.steps.double(), b.steps.double())
    width = _accumulator_bits(a.grid.spec, b.grid.spec)
    return Accumulator(sums, a.grid.scale * b.grid.scale, bits=width)


PAIRS: dict[str, Callable[[Codes, Codes], Pending]] = {
    "add": Sum,
    "mul": Product,
    "matmul": _multiply,
}


def _accumulator_bits(a: QuantSpec, b: QuantSpec) -> int:
    """Return what chips add products up in: 32 bits, and 48 bits where codes are wider than 8."""
    return 32 if max(a.bits, b.bits) <= 8 else 48


def _per_channel(scale: Tensor) -> Tensor:
    """Return the scale of each output channel, ``(O,)``, or the only one, ``()``."""
    return scale if scale.ndim == 0 else scale.reshape(*scale.shape[:2], -1)[..., 0].flatten()
