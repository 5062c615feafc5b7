"""Averaged weights: what is validated and exported is the moving average of what is trained.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; with a
decay, as the moving averages of TensorFlow's ``ExponentialMovingAverage``, whose warm-up this has.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qat.kinds import number, require
from qat.training.phases import is_quantized
from qat.training.task import QATTask


class EMA(pl.Callback):
    """Average every parameter, scales too, from the step on from which the model is quantized.

    Averages take the place of the parameters for validation, in every checkpoint, and for good
    when training ends; stand in front of the milestones, so that what they still do then is done
    to the averages. Phases, masks, batch-norm statistics and other buffers are always the live
    model's, which is why a milestone never has to act twice.

    Args:
        decay: Share of the average that a step keeps, 0 to 1; the first steps keep
            ``(1 + n) / (10 + n)`` of it, if that is less.

    Raises:
        ConfigError: If it is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        require("callbacks.ema.decay", decay, number(0, below=1))
        self.decay = decay
        self.updates = 0
        self.averages: dict[str, Tensor] = {}
        """Parameter name to its average; empty until the model is quantized."""
        self._live: dict[str, Tensor] = {}
        self._step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring a resumed run's trained parameters back; its checkpoint has their averages."""
        self._step = trainer.global_step
        if self._live:
            _put(pl_module, self._live)
            self._live = {}
        self.averages = {n: v.to(pl_module.device) for n, v in self.averages.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Follow an optimizer step."""
        del outputs, batch, batch_idx
        assert isinstance(pl_module, QATTask)
        if trainer.global_step == self._step or not is_quantized(pl_module.model):
            return
        self._step = trainer.global_step
        if not self.averages:
            self.averages = _copy(pl_module)
            return
        self.updates += 1
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in _parameters(pl_module).items():
            self.averages[name].lerp_(parameter, 1 - kept)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the averages in place."""
        del trainer
        if self.averages:
            self._live = _copy(pl_module)
            _put(pl_module, self.averages)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the trained parameters back."""
        del trainer
        if self.averages:
            _put(pl_module, self._live)
            self._live = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the averages the parameters."""
        del trainer
        if self.averages:
            _put(pl_module, self.averages)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages as the model, and the trained parameters beside them."""
        del trainer, pl_module
        state = checkpoint["state_dict"]
        saved = checkpoint["callbacks"][self.state_key]
        saved["live"] = {n: state[n].clone() for n in self.averages if n in state}
        state.update({n: self.averages[n].clone() for n in saved["live"]})

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and how often they moved."""
        return {"averages": dict(self.averages), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, and what was saved beside it."""
        self.averages, self.updates = dict(state_dict["averages"]), state_dict["updates"]
        self._live = state_dict["live"]


def _parameters(task: pl.LightningModule) -> dict[str, nn.Parameter]:
    """All parameters under all their names: tied ones have several in a state dict."""
    return dict(task.named_parameters(remove_duplicate=False))


def _copy(task: pl.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _parameters(task).items()}


@torch.no_grad()
def _put(task: pl.LightningModule, values: dict[str, Tensor]) -> None:
    parameters = _parameters(task)
    for name, value in values.items():
        parameters[name].copy_(value)
