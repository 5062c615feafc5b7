"""What callbacks do when training ends, done exactly once, though a run be killed just before."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar


class Ending(pl.Callback):
    """Remember in the checkpoint whether ``on_train_end`` was called.

    The last checkpoint of an epoch is written before it. A run that resumes there has no batch
    left; Lightning then skips the loop, and ``on_train_end`` with it.
    """

    def __init__(self) -> None:
        self.done = False
        self._loops: dict[str, Any] = {}
        self._is_late = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note it."""
        del trainer, pl_module
        self.done = True

    def catch_up(self, trainer: pl.Trainer, task: pl.LightningModule) -> bool:
        """Call ``on_train_end`` of all callbacks where that is all a resumed run has left.

        Returns whether it was; post-training runs never train, and their callbacks know that.
        """
        if self.done or trainer.max_epochs == 0:
            return False
        self._is_late = True
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if not isinstance(callback, ProgressBar):  # it has not started
                callback.on_train_end(trainer, task)
        return True

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what a loop that is skipped does not read."""
        del trainer, pl_module
        self._loops = checkpoint["loops"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the loops as they would stand had they not been skipped."""
        del trainer, pl_module
        if self._is_late:
            for progress in self._loops["fit_loop"]["epoch_progress"].values():
                progress["completed"] = progress["processed"]
            checkpoint["loops"] = self._loops

    def state_dict(self) -> dict[str, Any]:
        """Return whether training has ended."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether training has ended."""
        self.done = bool(state_dict["done"])
