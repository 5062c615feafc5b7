"""What keeps a run honest: finite losses, and random numbers that a resume cannot change."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from qat.errors import TrainingError
from qat.kinds import require, whole


class StopOnNonFinite(pl.Callback):
    """Stop when the loss is NaN or infinite; checkpoints from before stay."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Check the loss of the batch.

        Raises:
            TrainingError: If it is not finite.
        """
        del batch, pl_module
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None and not bool(torch.isfinite(loss)):
            paths = [c.best_model_path for c in _checkpoints(trainer) if c.best_model_path]
            saved = paths[0] if paths else "none yet"
            raise TrainingError(
                f"expected a finite loss, got {float(loss)} in epoch {trainer.current_epoch}, "
                f"batch {batch_idx}: lower optimizer.rates.lr or optimizer.rates.qat_lr, or set "
                f"trainer.gradient_clip_val=1.0; the last good checkpoint is kept ({saved})."
            )


def _checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


class SeedSteps(pl.Callback):
    """Give every training batch a random stream of its own, of seed, epoch and batch number alone.

    So a run that was killed and resumed draws what an uninterrupted one draws.

    Args:
        seed: The run's seed.

    Raises:
        ConfigError: If it is no whole number of at least 0.
    """

    def __init__(self, seed: int = 0) -> None:
        require("callbacks.seed_steps.seed", seed, whole(0))
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch for this batch; ranks draw differently."""
        del pl_module, batch
        place = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(hash(place) & 0x7FFFFFFF)
