"""Annealing: what a quantizer keeps soft in training becomes hard before scales freeze."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import nn

from qat.fake_quant import fake_quants
from qat.quantizers.base import Quantizer
from qat.training.schedule import Schedule
from qat.training.task import QATTask


def anneal(model: nn.Module, progress: float) -> None:
    """Tell every quantizer that has something to sharpen how far the run has come.

    Args:
        model: A prepared model.
        progress: 0 to 1; at 1 nothing is soft any more.
    """
    for fake_quant in fake_quants(model):
        if type(fake_quant.quantizer).anneal is not Quantizer.anneal:
            fake_quant.quantizer.anneal(progress)


def anneal_progress(step: int, total_steps: int, schedule: Schedule) -> float:
    """Return the progress at optimizer step ``step``: 0 until calibration, 1 where scales freeze.

    Args:
        step: Optimizer steps taken.
        total_steps: Optimizer steps of the whole run.
        schedule: The run's milestones.
    """
    start = schedule.step("calibrate", total_steps)
    end = schedule.step("freeze_observers", total_steps)
    return min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)


class Anneal(pl.Callback):
    """Anneal every quantizer in front of each batch, linearly up to the step where scales freeze.

    It is a function of the step alone, and what it sets is in the quantizers' buffers, so there is
    nothing of its own to save. What is still soft when training ends becomes hard then; stand in
    front of ``Calibrate``, so that post-training quantization calibrates behind hard weights.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make everything hard if there is nothing to train."""
        if trainer.max_epochs == 0:
            self.on_train_end(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the progress of this step."""
        del batch, batch_idx
        assert isinstance(pl_module, QATTask)
        step, total = trainer.global_step, pl_module.total_steps
        anneal(pl_module.model, anneal_progress(step, total, pl_module.schedule))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make everything hard."""
        del trainer
        assert isinstance(pl_module, QATTask)
        anneal(pl_module.model, 1.0)
