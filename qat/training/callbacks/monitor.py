"""What TensorBoard shows beyond the loss: noise, clipping, scales, sparsity, weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from qat.analysis.noise import measure_noise
from qat.layers import quantized_layers
from qat.training.callbacks.calibrate import Calibrate
from qat.training.task import QATTask

DASHBOARD = {
    "overview": {
        "accuracy, percent": ["Multiline", ["val/quantized_accuracy", "val/float_baseline"]],
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "signal to quantization noise, decibel": ["Multiline", ["sqnr_db/.*"]],
        "share clipped": ["Multiline", ["clipped/.*"]],
        "share of zero weights": ["Multiline", ["sparsity/.*"]],
    }
}
"""TensorBoard's Custom Scalars page: what belongs together in one chart."""


class Monitor(pl.Callback):
    """Log, after every validation, what quantization does to each site, on one fixed batch.

    Args:
        num_samples: Samples of the fixed batch.
        histograms: Whether to log weight histograms to TensorBoard.
    """

    def __init__(self, num_samples: int = 64, histograms: bool = True) -> None:
        self.num_samples = num_samples
        self.histograms = histograms
        self._batch: Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out TensorBoard's Custom Scalars page."""
        del pl_module
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(DASHBOARD)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        if trainer.sanity_checking or not trainer.is_global_zero or not trainer.loggers:
            return
        assert isinstance(pl_module, QATTask)
        values = {**self._sites(trainer, pl_module), **_sparsity(pl_module)}
        baseline = _float_accuracy(trainer)
        if baseline is not None:
            values["val/float_baseline"] = baseline
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
            if self.histograms and isinstance(logger, TensorBoardLogger):
                _log_histograms(logger, pl_module, trainer.global_step)

    def _sites(self, trainer: pl.Trainer, task: QATTask) -> dict[str, float]:
        batch = self._batch
        if batch is None:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            batch = self._batch = data.calibration_batches(1)[0][: self.num_samples]
        was_training = task.model.training
        task.model.eval()
        noise = measure_noise(task.model, batch.to(task.device))
        task.model.train(was_training)
        values = {}
        for site, found in noise.items():
            values[f"sqnr_db/{site}"] = found.sqnr
            values[f"clipped/{site}"] = found.clipped
            values[f"scale/{site}"] = found.scale
        return values


def _float_accuracy(trainer: pl.Trainer) -> float | None:
    """Return the float validation accuracy that the Calibrate callback measured."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, Calibrate):
            return callback.float_val_accuracy
    return None


@torch.no_grad()
def _sparsity(task: QATTask) -> dict[str, float]:
    values = {}
    for name, layer in quantized_layers(task.model):
        shown = layer.weight if layer.weight_quant.active else layer.raw_weight
        values[f"sparsity/{name}"] = (shown == 0).double().mean().item()
    return values


@torch.no_grad()
def _log_histograms(logger: TensorBoardLogger, task: QATTask, step: int) -> None:
    for name, layer in quantized_layers(task.model):
        logger.experiment.add_histogram(f"weight/{name}", layer.raw_weight.cpu(), step)
