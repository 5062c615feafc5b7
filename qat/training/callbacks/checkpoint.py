"""Checkpoints and early stopping that look at the quantized accuracy only."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from qat.training.phases import is_quantized
from qat.training.task import QATTask


class QuantizedCheckpoint(ModelCheckpoint):
    """Keep the checkpoint with the best metric of the quantized model; float epochs do not count.

    Takes what Lightning's ``ModelCheckpoint`` takes.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the metric once the model is quantized."""
        assert isinstance(pl_module, QATTask)
        if is_quantized(pl_module.model):
            super().on_validation_end(trainer, pl_module)


class QuantizedEarlyStopping(EarlyStopping):
    """Stop when the quantized validation accuracy no longer rises; float epochs do not count.

    Args:
        patience: Validations without a rise before stopping.
        min_delta: Smallest rise that counts, percent.
    """

    def __init__(self, patience: int = 10, min_delta: float = 0.0) -> None:
        super().__init__(
            monitor="val/quantized_accuracy", mode="max", patience=patience, min_delta=min_delta
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the metric once the model is quantized."""
        assert isinstance(pl_module, QATTask)
        if is_quantized(pl_module.model):
            super().on_validation_end(trainer, pl_module)
