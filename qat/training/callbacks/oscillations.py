"""Oscillating weights: watch them, freeze them, or pull them to the centres of their codes."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from qat.errors import ConfigError
from qat.kinds import FRACTION, number, require
from qat.layers import QuantizedLayer, quantized_layers
from qat.training.oscillations import (
    Oscillations,
    can_hold,
    cosine,
    dampening,
    hold_codes,
    weight_codes,
)
from qat.training.schedule import Schedule
from qat.training.task import QATTask

log = logging.getLogger("qat")


def quantized_progress(step: int, total_steps: int, schedule: Schedule) -> float:
    """Return which share of the steps behind calibration is done at ``step``, 0 to 1."""
    start = schedule.step("calibrate", total_steps)
    return min(max((step - start) / max(1, total_steps - start), 0.0), 1.0)


class TrackOscillations(pl.Callback):
    """Follow the codes of every quantized weight, step by step; ``Monitor`` logs what it sees.

    Args:
        momentum: Share of the newest step in the moving averages, above 0 and up to 1.

    Raises:
        ConfigError: If it is out of range.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        require("oscillations.momentum", momentum, number(above=0, high=1))
        self.momentum = momentum
        self.found: dict[str, Oscillations] = {}
        """Layer name to the history of its codes."""
        self._saved: dict[str, dict[str, Tensor]] = {}
        self._step = 0

    @property
    def shares(self) -> dict[str, float]:
        """Layer name to the share of its weights that oscillate, 0 to 1."""
        return {name: history.share for name, history in self.found.items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring a resumed run's histories back."""
        assert isinstance(pl_module, QATTask)
        self._step = trainer.global_step
        for name, layer in quantized_layers(pl_module.model):
            if name in self._saved:
                self.found[name] = Oscillations(weight_codes(layer), self.momentum)
                self.found[name].load(self._saved[name])
                self.begin(name, layer)
        self._saved = {}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the codes behind an optimizer step."""
        del outputs, batch, batch_idx
        assert isinstance(pl_module, QATTask)
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        progress = quantized_progress(self._step, pl_module.total_steps, pl_module.schedule)
        for name, layer in quantized_layers(pl_module.model):
            if layer.weight_quant.active:
                self._look(name, layer, progress)

    def _look(self, name: str, layer: QuantizedLayer, progress: float) -> None:
        codes = weight_codes(layer)
        if name not in self.found:
            self.found[name] = Oscillations(codes, self.momentum)
            self.begin(name, layer)
        else:
            self.found[name].update(codes)
        self.follow(name, layer, progress)

    def begin(self, name: str, layer: QuantizedLayer) -> None:
        """Act when a layer is seen first, also by a resumed run; nothing to do, here."""

    def follow(self, name: str, layer: QuantizedLayer, progress: float) -> None:
        """Act on a layer behind every step; nothing to do, here.

        Args:
            name: The layer's name.
            layer: The layer.
            progress: Share of the steps behind calibration that is done, 0 to 1.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the histories of all layers."""
        return {"found": {name: history.state() for name, history in self.found.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, as soon as there is a model."""
        self._saved = state_dict["found"]


class FreezeOscillations(TrackOscillations):
    """Freeze weights that oscillate too often at the rounded average of their codes.

    A frozen weight keeps its code, also where its scale or batch-norm still moves. The threshold
    falls along a cosine from ``start`` to ``end``, over the steps behind calibration.

    Args:
        start: First threshold, oscillations per step; more than ``momentum`` allows is none.
        end: Last threshold.
        momentum: Share of the newest step in the moving averages, above 0 and up to 1.

    Raises:
        ConfigError: If a value is out of range.

    Paper:
        Nagel et al., arXiv:2203.11086, iterative weight freezing. The defaults are those that its
        authors' code gives for 4-bit weights.
    """

    def __init__(self, start: float = 0.1, end: float = 0.01, momentum: float = 0.01) -> None:
        super().__init__(momentum)
        require("oscillations.start", start, FRACTION)
        require("oscillations.end", end, FRACTION)
        if end > start:
            raise ConfigError(
                "expected 0 <= oscillations.end <= oscillations.start <= 1, got "
                f"start={start} and end={end}: correct them."
            )
        self.start, self.end = start, end
        self._skipped: set[str] = set()

    def begin(self, name: str, layer: QuantizedLayer) -> None:
        """Leave a layer out whose weights cannot be set to a code."""
        if not can_hold(layer):
            self._skipped.add(name)
            log.warning("oscillations in '%s' are not frozen: its quantizer moves weights", name)

    def follow(self, name: str, layer: QuantizedLayer, progress: float) -> None:
        """Freeze what oscillates, and set all frozen weights to their codes."""
        if name not in self._skipped:
            history = self.found[name]
            history.freeze(cosine(self.start, self.end, progress))
            hold_codes(layer, history.codes, history.frozen)


class Dampen(pl.Callback):
    """Add the squared distance of weights from the centres of their codes to the loss.

    Its weight goes along a cosine from ``start`` to ``end``, over the steps behind calibration.
    It is a function of the step alone, so there is nothing to save.

    Args:
        end: Last weight of the loss.
        start: First weight.

    Raises:
        ConfigError: If a weight is negative.

    Paper:
        Nagel et al., arXiv:2203.11086, oscillation dampening. The defaults are those that its
        authors' code gives for 4-bit weights.
    """

    def __init__(self, end: float = 0.1, start: float = 0.0) -> None:
        require("oscillations.start", start, number(0))
        require("oscillations.end", end, number(0))
        self.start, self.end = start, end

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the task its penalty, with the weight of this step."""
        del batch, batch_idx
        assert isinstance(pl_module, QATTask)
        task = pl_module
        progress = quantized_progress(trainer.global_step, task.total_steps, task.schedule)
        weight = cosine(self.start, self.end, progress)
        task.penalties["dampen"] = lambda: weight * dampening(task.model)
