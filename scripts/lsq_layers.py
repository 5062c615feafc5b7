"""Learned Step Size Quantization as a researcher would write it around a network, in one page.

It shares no line with qat, so that ``peers.py`` compares two implementations. Source: Esser et al.,
arXiv:1902.08153, eq. 1-5 and section 2: one step size for each tensor, 2 * mean(|v|) / sqrt(Q_P) to
begin with, gradients times 1 / sqrt(N * Q_P), 8 bits for the first and the last layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def _grad_scale(x: Tensor, factor: float) -> Tensor:
    return (x - x * factor).detach() + x * factor


def _round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


class LsqStep(nn.Module):
    """Quantize and dequantize ``v`` with a learned step size; shape of ``v``."""

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.step = nn.Parameter(torch.zeros(()))

    def forward(self, v: Tensor) -> Tensor:
        """Return ``v`` on its grid; the first tensor to come sets the step size."""
        if self.step.item() == 0:
            with torch.no_grad():
                self.step.copy_(2 * v.abs().mean() / self.high**0.5)
        step = _grad_scale(self.step, (v.numel() * self.high) ** -0.5)
        return _round_pass((v / step).clamp(self.low, self.high)) * step


class LsqLayer(nn.Module):
    """A convolution or linear layer whose input and weight are quantized."""

    def __init__(self, layer: Any, weight_bits: int, activation_bits: int, *, signed: bool) -> None:
        super().__init__()
        self.layer = layer
        self.on_weight = LsqStep(weight_bits, signed=True)
        self.on_input = LsqStep(activation_bits, signed=signed)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x``."""
        x, weight = self.on_input(x), self.on_weight(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def quantize_layers(model: nn.Module, weight_bits: int, activation_bits: int) -> None:
    """Replace every convolution and linear layer of ``model``, in place.

    Only the first reads signed values: images; behind it are ReLUs. Attention that reads the
    weights of its layers stays float.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    found = [(n, m) for n, m in layers if not isinstance(m, NonDynamicallyQuantizableLinear)]
    for i, (name, layer) in enumerate(found):
        bits = (8, 8) if i in (0, len(found) - 1) else (weight_bits, activation_bits)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LsqLayer(layer, *bits, signed=i == 0))
