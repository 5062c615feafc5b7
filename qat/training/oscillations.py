"""Oscillations: weights that jump to and fro between two codes; their tracking, freezing, damping.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv:2203.11086: the parts on quantifying oscillations, dampening, and iterative weight freezing.
Differs: codes are tracked, so a moving scale counts, too; dampening is summed over all layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qat.functional.affine import dequantize, expand
from qat.layers import QuantizedLayer, quantized_layers
from qat.quantizers import Quantizer

OFTEN = 0.005
"""A weight whose frequency is above it oscillates, as the paper counts them."""


class Oscillations:
    """The history of the codes of one weight tensor; all tensors have the weight's shape.

    An oscillation is a change of code in the direction opposite to that of the last change.

    Args:
        codes: The codes to start from.
        momentum: Share of the newest step in both moving averages, 0 to 1.

    Attributes:
        codes: Codes of the last step.
        direction: Sign of the last change; 0 before the first.
        frequency: Moving average of oscillations per step, 0 to 1.
        average: Moving average of the codes.
        frozen: Where codes no longer change.
    """

    NAMES = ("codes", "direction", "frequency", "average", "frozen")

    def __init__(self, codes: Tensor, momentum: float) -> None:
        self.momentum = momentum
        self.codes, self.average = codes.clone(), codes.clone()
        self.direction, self.frequency = torch.zeros_like(codes), torch.zeros_like(codes)
        self.frozen = torch.zeros_like(codes, dtype=torch.bool)

    def update(self, codes: Tensor) -> None:
        """Take the codes of one more step; what is frozen stays as it is.

        Args:
            codes: Integers, float32.
        """
        change = (codes - self.codes).sign()
        turned = (change * self.direction < 0).float()
        moves = ~self.frozen
        self.frequency[moves] = torch.lerp(self.frequency, turned, self.momentum)[moves]
        self.average[moves] = torch.lerp(self.average, codes, self.momentum)[moves]
        self.direction = torch.where(change != 0, change, self.direction)
        self.codes = torch.where(self.frozen, self.codes, codes)

    def freeze(self, threshold: float) -> None:
        """Freeze the codes that oscillate more often than ``threshold``, at their rounded average.

        Args:
            threshold: Oscillations per step, 0 to 1.
        """
        new = (self.frequency > threshold) & ~self.frozen
        self.codes = torch.where(new, self.average.round(), self.codes)
        self.frozen |= new

    @property
    def share(self) -> float:
        """Share of the weights that oscillate and are not frozen, 0 to 1."""
        return ((self.frequency > OFTEN) & ~self.frozen).double().mean().item()

    def state(self) -> dict[str, Tensor]:
        """Return copies of all tensors by name."""
        return {name: getattr(self, name).clone() for name in self.NAMES}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what ``state`` gave, on the device of the present codes."""
        for name in self.NAMES:
            setattr(self, name, state[name].to(self.codes.device, copy=True))


@torch.no_grad()
def weight_codes(layer: QuantizedLayer) -> Tensor:
    """Return the codes of a layer's weight on its grid of training, float32, shape of the weight.

    Args:
        layer: A layer whose weight is calibrated.
    """
    return layer.weight_quant.quantizer.codes(layer.raw_weight * layer.grid_gain)


@torch.no_grad()
def can_hold(layer: QuantizedLayer) -> bool:
    """Whether a weight that is set to the real value of its code has that code.

    A quantizer that transforms weights in front of their grid has no such value.
    """
    quantizer, codes = layer.weight_quant.quantizer, weight_codes(layer)
    values = dequantize(codes, quantizer.scale, quantizer.zero_point)
    return torch.equal(quantizer.codes(values), codes)


@torch.no_grad()
def hold_codes(layer: QuantizedLayer, codes: Tensor, where: Tensor) -> None:
    """Set the trained weight to the real values of ``codes``, in place.

    Args:
        layer: A layer whose weight is calibrated.
        codes: Integers. Shape of the weight.
        where: Which weights to set. Shape of the weight.
    """
    quantizer, weight = layer.weight_quant.quantizer, layer._parameters["weight"]
    assert weight is not None
    values = dequantize(codes, quantizer.scale, quantizer.zero_point) / layer.grid_gain
    weight.copy_(torch.where(where, values.to(weight.dtype), weight))


def cosine(start: float, end: float, progress: float) -> float:
    """Return the value ``progress`` (0 to 1) of the way along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def dampening_loss(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the squared distance of weights from the centres of their codes, shape ``()``.

    Centres and scale receive no gradient; nor does a weight outside the grid, which cannot
    oscillate.

    Args:
        weight: Real values in front of their grid.
        quantizer: Has the grid.
    """
    scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach()
    centre = dequantize(quantizer.codes(weight), scale, zero_point)
    low, high = (
        ((code - zero_point) * scale)
        for code in (quantizer.code_spec.qmin, quantizer.code_spec.qmax)
    )
    inside = weight.float().clamp(expand(low, weight.shape), expand(high, weight.shape))
    return (centre - inside).square().sum()


def dampening(model: nn.Module) -> Tensor:
    """Return the dampening loss of all weights that quantize, shape ``()``."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for _, layer in quantized_layers(model):
        if layer.weight_quant.active:
            weight = layer.raw_weight * layer.grid_gain.detach()
            total = total + dampening_loss(weight, layer.weight_quant.quantizer)
    return total
