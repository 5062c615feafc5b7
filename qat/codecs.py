"""Codecs: what a converted model has in place of the fake-quants of activations.

Their arithmetic goes through ``qat::quantize`` and ``qat::dequantize``, so an exporter has nothing
left to decide.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.fake_quant import FakeQuant
from qat.functional.affine import dequantize
from qat.functional.codes import dequantize_codes, look_up, quantize_codes, quantize_dynamic
from qat.functional.dynamic import token_scale
from qat.quantizers import DynamicTensor, TableQuantizer
from qat.spec import QuantSpec


def storage_type(spec: QuantSpec, *, signed: bool) -> torch.dtype:
    """Return the integer type that stores codes of ``spec``."""
    if spec.bits <= 8:
        return torch.int8 if signed else torch.uint8
    return torch.int16 if signed else torch.uint16


class ActivationCodec(nn.Module):
    """Quantize and dequantize the tensors of one site, with frozen integer parameters.

    Codes are stored unsigned, signed ones moved up by half the type's range: runtimes have their
    fast kernels for unsigned activations.

    Args:
        site: The site's name.
        spec: Its format.
        scale: Grid spacing, real values, shape ``()``.
        zero_point: Stored code of 0, an integer of shape ``()``.
        qmin: Lowest stored code.
        qmax: Highest stored code.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, site: str, spec: QuantSpec, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
    ) -> None:
        super().__init__()
        self.site, self.spec = site, spec
        self.qmin, self.qmax = qmin, qmax
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(storage_type(spec, signed=False)))

    @classmethod
    def of(cls, fake_quant: FakeQuant) -> ActivationCodec:
        """Return what takes the place of a trained fake-quant."""
        spec, quantizer = fake_quant.spec, fake_quant.quantizer
        storage = storage_type(spec, signed=False)
        offset = 2 ** (8 * storage.itemsize - 1) if spec.signed else 0
        zero_point = torch.tensor(int(quantizer.zero_point.item()) + offset, dtype=storage)
        scale = quantizer.scale.detach().clone()
        ends = (spec.qmin + offset, spec.qmax + offset)
        return cls(fake_quant.site, spec, scale, zero_point, *ends)

    def clip(self, low: float, high: float | None) -> None:
        """Take over a clipping of real values to ``low..high`` in front of this quantize."""
        zero, scale = int(self.zero_point.item()), self.scale
        self.qmin = max(self.qmin, zero + int((torch.tensor(low) / scale).round().item()))
        if high is not None:
            self.qmax = min(self.qmax, zero + int((torch.tensor(high) / scale).round().item()))

    def codes(self, x: Tensor) -> Tensor:
        """Return the stored codes of real values ``x``, shape of ``x``."""
        return quantize_codes(x, self.scale, self.zero_point, self.qmin, self.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """Snap real values ``x`` to the grid, through integers; shape of ``x``."""
        return dequantize_codes(self.codes(x), self.scale, self.zero_point, 0, 0)


class Lookup(nn.Module):
    """Move real values onto a grid by a table, in front of a quantize that then rounds nothing.

    Args:
        thresholds: Ascending real values, shape ``(n,)``.
        values: Points of the grid, real values, shape ``(n + 1,)``.
    """

    thresholds: Tensor
    values: Tensor

    def __init__(self, thresholds: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("values", values)

    @classmethod
    def of(cls, fake_quant: FakeQuant) -> Lookup | None:
        """Return the table of a trained fake-quant, ``None`` where codes are rounded quotients."""
        quantizer = fake_quant.quantizer
        if not isinstance(quantizer, TableQuantizer):
            return None
        thresholds, codes = quantizer.table()
        return cls(thresholds, dequantize(codes, quantizer.scale.detach(), quantizer.zero_point))

    def forward(self, x: Tensor) -> Tensor:
        """Return points of the grid, real values, shape of ``x``."""
        return look_up(x, self.thresholds, self.values)


class DynamicCodec(nn.Module):
    """Quantize and dequantize every token with the scale that it brings.

    ONNX has no operator for that, so it is plain arithmetic; the codes stay inside.

    Args:
        site: The site's name.
        spec: Its format.
    """

    def __init__(self, site: str, spec: QuantSpec) -> None:
        super().__init__()
        self.site, self.spec = site, spec

    def forward(self, x: Tensor) -> Tensor:
        """Snap real values ``x`` to the grid of each token; shape of ``x``."""
        scale = token_scale(x, self.spec.qmax)
        return (x / scale).round().clamp(self.spec.qmin, self.spec.qmax) * scale


class DynamicTensorCodec(nn.Module):
    """Quantize and dequantize a whole tensor on the grid that it brings.

    Args:
        site: The site's name.
        spec: Its format: 8 bits, unsigned, affine.
    """

    def __init__(self, site: str, spec: QuantSpec) -> None:
        super().__init__()
        self.site, self.spec = site, spec

    def forward(self, x: Tensor) -> Tensor:
        """Snap real values ``x`` to the grid, through integers; shape of ``x``."""
        codes, scale, zero_point = quantize_dynamic(x)
        return dequantize_codes(codes, scale, zero_point, 0, 0)


def make_codec(fake_quant: FakeQuant) -> ActivationCodec | DynamicCodec | DynamicTensorCodec:
    """Return what a converted model has in place of an activation's fake-quant."""
    if isinstance(fake_quant.quantizer, DynamicTensor):
        return DynamicTensorCodec(fake_quant.site, fake_quant.spec)
    if fake_quant.quantizer.is_dynamic:
        return DynamicCodec(fake_quant.site, fake_quant.spec)
    return ActivationCodec.of(fake_quant)
