"""The base of every callback that does one thing at one moment of the run."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl

from qat.training.task import QATTask

log = logging.getLogger("qat")


class Milestone(pl.Callback):
    """Act once, in front of the first batch at or after a step of the schedule.

    Whether it has acted is in the checkpoint. What is still open when training ends (post-training
    quantization, a very short run, or an early stop) is done then, in the order of the callbacks;
    a run of no epochs at all ends where it starts.
    """

    name: str
    """The schedule's word for the moment."""
    title: str = ""
    """What the log calls it, where that is another word."""

    def __init__(self) -> None:
        self.done = False

    @abstractmethod
    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Do it."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act now if there is nothing to train: no other moment will come."""
        if trainer.max_epochs == 0:
            self.on_train_end(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Act if the moment has come."""
        del batch, batch_idx
        assert isinstance(pl_module, QATTask)
        total = pl_module.total_steps
        if not self.done and trainer.global_step >= pl_module.schedule.step(self.name, total):
            self._act_once(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act now if the moment never came."""
        assert isinstance(pl_module, QATTask)
        if not self.done:
            self._act_once(trainer, pl_module)

    def _act_once(self, trainer: pl.Trainer, task: QATTask) -> None:
        self.act(trainer, task)
        self.done = True
        if trainer.is_global_zero:
            log.info(
                "step %d: %s", trainer.global_step, (self.title or self.name).replace("_", " ")
            )

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has acted."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether it has acted."""
        self.done = state_dict["done"]
