"""Checkpoints and early stopping that look at the quantized accuracy only."""

from __future__ import annotations

from pathlib import Path
from shutil import copyfileobj
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from qat.files import replacing
from qat.training.phases import is_quantized
from qat.training.task import QATTask

CHECKPOINT = ".ckpt"


class QuantizedCheckpoint(ModelCheckpoint):
    """Keep the checkpoint with the best metric of the quantized model; float epochs do not count.

    Takes what Lightning's ``ModelCheckpoint`` takes.
    """

    _resumed: Path | None = None
    """The folder of the checkpoint that is resumed."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the metric once the model is quantized."""
        assert isinstance(pl_module, QATTask)
        if is_quantized(pl_module.model):
            super().on_validation_end(trainer, pl_module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember beside which checkpoint the best one may lie."""
        super().setup(trainer, pl_module, stage)
        self._resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).parent

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and its file; without the file, the best starts anew.

        The file is looked for beside the checkpoint that is resumed, wherever its path was then.
        """
        name = Path(state_dict["best_model_path"]).name
        here = Path(str(self.dirpath)) / name
        old = None if self._resumed is None else self._resumed / name
        if old is not None and old.suffix == CHECKPOINT and not here.is_file() and old.is_file():
            _copy(old, here)  # resumed in another folder
        if here.is_file():
            super().load_state_dict(_moved(state_dict, str(self.dirpath)))
            self.current_score = state_dict["current_score"]  # Lightning leaves it out


def _copy(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    with old.open("rb") as source, replacing(new) as target:
        copyfileobj(source, target)


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the state of a ``ModelCheckpoint`` whose files are in ``folder`` now."""

    def move(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    models = {move(path): score for path, score in state["best_k_models"].items()}
    moved = {name: move(state[name]) for name in paths}
    return {**state, **moved, "best_k_models": models, "dirpath": folder}


class QuantizedEarlyStopping(EarlyStopping):
    """Stop when the quantized validation accuracy no longer rises; float epochs do not count.

    Args:
        patience: Validations without a rise before stopping.
        min_delta: Smallest rise that counts, percent.
    """

    def __init__(self, patience: int = 10, min_delta: float = 0.0) -> None:
        super().__init__(
            monitor="val/quantized_accuracy",
            mode="max",
            patience=patience,
            min_delta=min_delta,
            check_on_train_epoch_end=False,  # Lightning would look there in float epochs, too
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train no further where the run that is resumed had stopped already."""
        del pl_module
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the metric once the model is quantized."""
        assert isinstance(pl_module, QATTask)
        if is_quantized(pl_module.model):
            super().on_validation_end(trainer, pl_module)
