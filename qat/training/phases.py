"""Which phase a model is in, read off the model itself: the one word users see everywhere."""

from __future__ import annotations

from torch import nn

from qat.batch_norm import Stage, batch_norms
from qat.fake_quant import Phase, activation_quants, fake_quants, weight_quants
from qat.layers import quantized_layers


def phase_of(model: nn.Module) -> str:
    """Return the phase of a prepared ``model``.

    In order: ``float``, ``quantize_weights``, ``quantize``, ``freeze_observers``,
    ``freeze_batch_norm``, ``fold``.
    """
    if any(layer.folded for _, layer in quantized_layers(model)):
        return "fold"
    phases = {f.phase for f in fake_quants(model)}
    norms = [norm for norm in batch_norms(model) if not norm.fixed]
    if phases and any(norm.stage is Stage.FROZEN for norm in norms):
        return "freeze_batch_norm"
    if Phase.FROZEN in phases:
        return "freeze_observers"
    if not is_quantized(model):
        return "quantize_weights" if any(f.active for f in weight_quants(model)) else "float"
    return "quantize"


def is_quantized(model: nn.Module) -> bool:
    """Whether every fake-quant of ``model`` is on."""
    quants = weight_quants(model) + activation_quants(model)
    return bool(quants) and all(f.active for f in quants)
