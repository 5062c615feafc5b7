"""What TensorBoard shows beyond the loss: of sites, of weights, of batch-norms."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from qat.analysis.codes import used_codes
from qat.analysis.noise import measure_noise
from qat.analysis.statistics import measure_divergence
from qat.calls import Call
from qat.fake_quant import fake_quants
from qat.kinds import FLAG, require, whole
from qat.layers import quantized_layers
from qat.quantizers import Quantizer
from qat.training.callbacks.calibrate import Calibrate
from qat.training.callbacks.oscillations import TrackOscillations
from qat.training.loggers import RunTensorBoard
from qat.training.oscillations import weight_codes
from qat.training.task import QATTask

DASHBOARD = {
    "overview": {
        "accuracy, percent": ["Multiline", ["val/quantized_accuracy", "val/float_baseline"]],
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "signal to quantization noise, decibel": ["Multiline", ["sqnr_db/.*"]],
        "share clipped": ["Multiline", ["clipped/.*"]],
        "share of zero weights": ["Multiline", ["sparsity/.*"]],
        "share of oscillating weights": ["Multiline", ["oscillating/.*"]],
        "share of codes in use": ["Multiline", ["used_codes/.*"]],
        "gradient of scales, norm": ["Multiline", ["scale_gradient/.*"]],
        "divergence of batch-norm statistics": ["Multiline", ["statistics/.*"]],
    }
}
"""TensorBoard's Custom Scalars page: what belongs together in one chart."""


class Monitor(pl.Callback):
    """Log, after every validation, what quantization does to each site, on one fixed batch.

    Gradients are those of the last step. Oscillating weights are known where a callback follows
    them (``oscillations=track``); what annealing sets is read from its quantizers' buffers.

    Args:
        num_samples: Samples of the fixed batch.
        histograms: Whether to log weight histograms to TensorBoard.

    Raises:
        ConfigError: If there are no samples, or ``histograms`` is neither true nor false.
    """

    def __init__(self, num_samples: int = 64, histograms: bool = True) -> None:
        require("callbacks.monitor.num_samples", num_samples, whole(1))
        require("callbacks.monitor.histograms", histograms, FLAG)
        self.num_samples = num_samples
        self.histograms = histograms
        self._batch: Call | None = None
        self._gradients: dict[str, list[Tensor]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out TensorBoard's Custom Scalars page, once: a resumed run goes on in its file."""
        del pl_module
        for logger in trainer.loggers:
            goes_on = isinstance(logger, RunTensorBoard) and logger.position() > 0
            if isinstance(logger, TensorBoardLogger) and not goes_on:
                logger.experiment.add_custom_scalars(DASHBOARD)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hold on to the gradients of what quantizers learn; validation clears them."""
        del trainer, outputs, batch, batch_idx
        assert isinstance(pl_module, QATTask)
        self._gradients = {
            fake_quant.site: [
                p.grad for p in fake_quant.quantizer.parameters() if p.grad is not None
            ]
            for fake_quant in fake_quants(pl_module.model)
        }

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        if trainer.sanity_checking or not trainer.is_global_zero or not trainer.loggers:
            return
        assert isinstance(pl_module, QATTask)
        values = {**self._sites(trainer, pl_module), **_weights(pl_module), **_annealed(pl_module)}
        values |= {**_oscillating(trainer), **_norms(self._gradients)}
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
            batch = self._batch = Call.of(data.calibration_batches(1)[0]).take(self.num_samples)
        was_training = task.model.training
        task.model.eval()
        batch = batch.to(task.device)
        noise, statistics = measure_noise(task.model, batch), measure_divergence(task.model, batch)
        task.model.train(was_training)
        values = {f"statistics/{name}": value for name, value in statistics.items()}
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


def _oscillating(trainer: pl.Trainer) -> dict[str, float]:
    """Return the share of weights that oscillate, where a callback counts them."""
    shares: dict[str, float] = {}
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, TrackOscillations):
            shares |= {f"oscillating/{name}": share for name, share in callback.shares.items()}
    return shares


@torch.no_grad()
def _weights(task: QATTask) -> dict[str, float]:
    values = {}
    for name, layer in quantized_layers(task.model):
        active = layer.weight_quant.active
        shown = layer.weight if active else layer.raw_weight
        values[f"sparsity/{name}"] = (shown == 0).double().mean().item()
        values[f"bits/{name}"] = float(layer.weight_quant.quantizer.spec.bits)
        if active:
            values[f"used_codes/{name}"] = used_codes(weight_codes(layer), layer.spec)
    return values


def _norms(gradients: dict[str, list[Tensor]]) -> dict[str, float]:
    return {
        f"scale_gradient/{site}": torch.cat([g.flatten() for g in found]).norm().item()
        for site, found in gradients.items()
        if found
    }


def _annealed(task: QATTask) -> dict[str, float]:
    """Return what annealing has set: single numbers in buffers, other than a grid's."""
    values = {}
    for fake_quant in fake_quants(task.model):
        quantizer = fake_quant.quantizer
        if type(quantizer).anneal is not Quantizer.anneal:
            for name, buffer in quantizer.named_buffers():
                if buffer.numel() == 1 and name not in ("zero_point", "observed_scale"):
                    values[f"annealed/{fake_quant.site}/{name}"] = float(buffer)
    return values


@torch.no_grad()
def _log_histograms(logger: TensorBoardLogger, task: QATTask, step: int) -> None:
    for name, layer in quantized_layers(task.model):
        logger.experiment.add_histogram(f"weight/{name}", layer.raw_weight.cpu(), step)
