"""Size penalty: bits cost, so that learned bit-widths shrink where accuracy allows it.

Source: Uhlich et al., "Mixed Precision DNNs", ICLR 2020, arXiv:1905.11452, section 3.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qat.fake_quant import Phase
from qat.kinds import number, require
from qat.layers import quantized_layers
from qat.quantizers import LearnedBits
from qat.training.task import QATTask


def mean_bits(model: nn.Module) -> Tensor:
    """Return the mean bits of the weights that learn theirs now, ``()``; 0 if there are none.

    Args:
        model: A prepared model.
    """
    total, count = torch.zeros(()), 0
    for _, layer in quantized_layers(model):
        quant, size = layer.weight_quant, layer.raw_weight.numel()
        if isinstance(quant.quantizer, LearnedBits) and quant.phase is Phase.QUANTIZE:
            bits = quant.quantizer.bits_in_use.mean()  # channels are of one size
            total, count = total.to(bits.device) + bits * size, count + size
    return total / max(count, 1)


class SizePenalty(pl.Callback):
    """Add ``weight`` times the mean bits of the weights to the loss.

    Differs from the paper, which penalises only what lies above a target size.

    Args:
        weight: Loss that one bit of all weights is worth, 0 or more.

    Raises:
        ConfigError: If it is negative.
    """

    def __init__(self, weight: float) -> None:
        require("callbacks.size_penalty.weight", weight, number(0))
        self.weight = weight

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the penalty to the task."""
        del trainer
        assert isinstance(pl_module, QATTask)
        model = pl_module.model
        pl_module.penalties["size"] = lambda: self.weight * mean_bits(model)
