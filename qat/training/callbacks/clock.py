"""How long each phase took, over all resumes of a run; and the phase in the progress bar."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from qat.training.phases import phase_of
from qat.training.task import QATTask

log = logging.getLogger("qat")


class Clock(pl.Callback):
    """Count the seconds of every phase; validation and calibration go to the phase around them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def _count(self, task: pl.LightningModule) -> None:
        assert isinstance(task, QATTask)
        now, phase = time.perf_counter(), phase_of(task.model)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what the milestones took if there is nothing to train; a resume adds nothing."""
        if trainer.max_epochs == 0 and not self.seconds:
            self._count(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        del trainer, pl_module
        self._last = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Give the time since the last call to the present phase."""
        del trainer, outputs, batch, batch_idx
        self._count(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the rest to the present phase."""
        del trainer
        self._count(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of every phase so far."""
        return {"seconds": dict(self.seconds)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds of every phase."""
        self.seconds = dict(state_dict["seconds"])


class PhaseProgressBar(TQDMProgressBar):
    """A progress bar that says which phase the run is in; silent where no terminal shows it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Switch the bar off where its output goes to a file."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what the bar shows: the phase and the logged metrics."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        assert isinstance(pl_module, QATTask)
        return {"phase": phase_of(pl_module.model), **items}


class EpochLines(pl.Callback):
    """Print one line for every validated epoch: readable in a file, without a terminal."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print epoch, phase, loss and accuracy."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, QATTask)
        metrics = trainer.callback_metrics
        names = [k for k in ("train/loss", "val/accuracy") if k in metrics]
        shown = [f"{name} {float(metrics[name]):.4g}" for name in names]
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if trainer.is_global_zero:
            log.info("%s", "  ".join([epoch, f"[{phase_of(pl_module.model)}]", *shown]))
