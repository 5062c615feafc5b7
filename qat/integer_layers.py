"""The layers of a converted model: their parameters are integers.

Their arithmetic goes through ``qat::dequantize``, and their parameters are laid out as ONNX
DequantizeLinear wants them, so an exporter has nothing left to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.batch_norm import channel_affine, channel_gain, channel_shift
from qat.codecs import Lookup, make_codec, storage_type
from qat.functional.codes import dequantize_codes
from qat.layers import IntegerParameters, QuantizedLayer, restore_layer
from qat.spec import QuantSpec
from qat.subclass import reduce_subclass, specialise


class ChannelAffine(nn.Module):
    """Multiply and add, channel by channel: a batch-norm that no layer could take.

    Args:
        gain: Multiplies the channels, shape ``(C,)``.
        shift: Is added to them, shape ``(C,)``.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    @classmethod
    def of(cls, norm: nn.Module) -> ChannelAffine:
        """Return what takes the place of a batch-norm with running statistics."""
        return cls(channel_gain(norm).detach(), channel_shift(norm).detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return real values, shape of ``x``, ``(N, C, ...)``."""
        return channel_affine(x, self.gain, self.shift)


class IntegerLayer(nn.Module):
    """Mixin of the layer subclass whose weight and bias are integers behind a dequantize."""

    spec: QuantSpec
    axis: int
    block: int
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias_codes: Tensor | None
    bias_scale: Tensor | None

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer makes of ``input``, which is quantized here if nowhere else."""
        codec = self._modules.get("input_codec")
        return super().forward(input if codec is None else codec(input), *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight's real values."""
        return dequantize_codes(
            self.weight_codes, self.weight_scale, self.weight_zero_point, self.axis, self.block
        )

    @property
    def bias(self) -> Tensor | None:
        """The bias's real values, shape ``(O,)``."""
        if self.bias_codes is None or self.bias_scale is None:
            return self._buffers.get("bias_float")
        return dequantize_codes(self.bias_codes, self.bias_scale, None, 0, 0)

    def integers(self) -> IntegerParameters:
        """Return codes and scales as ``QuantizedLayer.integers`` gave them."""
        scale, zero_point = self.weight_scale, self.weight_zero_point.float()
        if scale.ndim == 1 and not self.block:
            shape = [-1 if a == self.axis else 1 for a in range(self.weight_codes.ndim)]
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        is_integer = self.bias_codes is not None
        bias = self.bias_codes if is_integer else self._buffers.get("bias_float")
        return IntegerParameters(self.weight_codes, scale, zero_point, bias, self.bias_scale)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_subclass(self, IntegerLayer)


def _onnx_layout(scale: Tensor, shape: torch.Size) -> tuple[Tensor, int, int]:
    """Return ``scale`` as DequantizeLinear takes it, with its axis and block size."""
    if scale.ndim == 0:
        return scale, 0, 0
    full = [i for i, n in enumerate(scale.shape) if n == shape[i] and n > 1]
    part = [i for i, n in enumerate(scale.shape) if 1 < n < shape[i]]
    if not part and len(full) <= 1:
        return scale.flatten(), (full or [0])[0], 0
    axis = (part or full)[0]
    sizes = [scale.shape[i] if i == axis else n for i, n in enumerate(shape)]
    return scale.expand(sizes).contiguous(), axis, shape[axis] // sizes[axis]


def convert_layer(layer: QuantizedLayer) -> None:
    """Turn a folded layer into an ``IntegerLayer``, in place."""
    parts, spec, links = layer.integers(), layer.spec, layer.links
    storage = storage_type(spec, signed=spec.signed)
    shape = parts.weight.shape
    scale, axis, block = _onnx_layout(parts.weight_scale, shape)
    zero_point, _, _ = _onnx_layout(parts.zero_point.expand_as(parts.weight_scale), shape)
    for name in ("weight", "bias"):
        layer._parameters.pop(name, None)
    restore_layer(layer)
    is_integer = parts.bias_scale is not None
    buffers = {
        "weight_codes": parts.weight.to(storage),
        "weight_scale": scale.detach().clone(),
        "weight_zero_point": zero_point.to(storage),
        "bias_codes": parts.bias if is_integer else None,
        "bias_scale": parts.bias_scale,
        "bias_float": None if is_integer else parts.bias,
    }
    make_integer(layer, spec, axis, block, buffers)
    if links.inner and links.input_quant is not None:
        lookup, codec = Lookup.of(links.input_quant), make_codec(links.input_quant)
        whole = codec if lookup is None else nn.Sequential(lookup, codec)
        layer.add_module("input_codec", whole)


def make_integer(
    layer: nn.Module, spec: QuantSpec, axis: int, block: int, buffers: Mapping[str, Tensor | None]
) -> None:
    """Give a layer without parameters integers instead, in place.

    Args:
        layer: A convolution, a linear layer or an embedding.
        spec: Format of its weight.
        axis: The channel or block axis, as ``dequantize_codes`` takes it.
        block: Consecutive indices of ``axis`` that share a scale; 0 for none.
        buffers: Integers and scales by name, ``None`` for those that it does not have.
    """
    specialise(layer, IntegerLayer, spec=spec, axis=axis, block=block)
    for name, value in buffers.items():
        layer.register_buffer(name, value)
