"""Calibration: measure the float model, observe ranges, switch quantization on, measure again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from qat.calls import on_batch, on_device
from qat.errors import CalibrationError
from qat.fake_quant import FakeQuant, Phase, activation_quants, weight_quants
from qat.graph.captured import Captured
from qat.initialise import Initialiser, check_order
from qat.kinds import Kind, require, whole
from qat.training.callbacks.milestone import Milestone
from qat.training.evaluate import Score, evaluate
from qat.training.task import QATTask

log = logging.getLogger("qat")
INITIALISERS = Kind(
    "a mapping from names to initialisers such as qat.initialise.Equalise",
    lambda value: (
        isinstance(value, Mapping) and all(isinstance(v, Initialiser) for v in value.values())
    ),
)


@torch.no_grad()
def observe(model: nn.Module, quants: Sequence[FakeQuant], batches: Sequence[Any]) -> None:
    """Show ``batches`` to ``quants``, set their scales, and let them quantize.

    The model runs in eval mode, so batch-norms neither move nor see the batch; full precision.

    Args:
        model: The model that holds them.
        quants: Fake-quants of one kind.
        batches: Inputs ``(N, ...)``, or tuples or mappings of arguments.

    Raises:
        CalibrationError: If there is no batch, or a site saw nothing, or nothing finite.
    """
    if not batches:
        raise CalibrationError(
            "expected at least one calibration batch, got none: "
            "set callbacks.calibrate.num_batches to 1 or more and check the training data."
        )
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        for quant in quants:
            quant.set_phase(Phase.OBSERVE)
            quant.train()
        with torch.autocast(device.type, enabled=False):
            for batch in batches:
                on_batch(model, on_device(batch, device))
        for quant in quants:
            quant.finish_calibration()
            quant.set_phase(Phase.QUANTIZE)
    finally:
        model.train(was_training)


class Calibrate(Milestone):
    """Measure the float accuracy, then calibrate weights, and activations behind them.

    A model that came with its weights is measured before the first step, one that this run trains
    in float at the end of that. Weights are calibrated first, so that activations are observed as
    quantized weights make them.

    Args:
        num_batches: Training batches, under evaluation transforms, to observe activations on.
        initialise: What prepares weights and biases, by name, in order.

    Raises:
        ConfigError: If there are no batches, or an initialiser is none, or stands behind one that
            needs it done.
    """

    name = "calibrate"

    def __init__(
        self, num_batches: int = 8, initialise: Mapping[str, Initialiser] | None = None
    ) -> None:
        super().__init__()
        initialise = initialise or {}
        require("callbacks.calibrate.num_batches", num_batches, whole(1))
        require("initialise", initialise, INITIALISERS)
        self.num_batches = num_batches
        self.initialisers = dict(initialise)
        check_order(self.initialisers)
        self.float_val_accuracy: float | None = None
        self.scores: dict[str, Score] = {}
        """On the test set, of ``float`` and ``post_training``: calibrated, not yet trained."""

    @property
    def float_accuracy(self) -> float | None:
        """Percent that the float model reaches on the test set, once it is measured."""
        return self.scores["float"].accuracy if "float" in self.scores else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the float accuracy of a model that came with its weights."""
        assert isinstance(pl_module, QATTask)
        if pl_module.schedule.float_epochs == 0:
            self._measure_once(trainer, pl_module)

    def _measure_once(self, trainer: pl.Trainer, task: QATTask) -> None:
        if "float" in self.scores:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.measure("float", trainer, task)
        self.float_val_accuracy = evaluate(task.model, data.val_dataloader()).accuracy

    def measure(self, kind: str, trainer: pl.Trainer, task: QATTask) -> None:
        """Evaluate the model as it is on the test set, and keep the score.

        Args:
            kind: What the model is, ``float`` or ``post_training``.
            trainer: Has the data.
            task: Has the model.
        """
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        found = self.scores[kind] = evaluate(task.model, data.test_dataloader())
        if trainer.is_global_zero:
            shown = (kind.replace("_", "-"), *found)
            log.info("%s accuracy: %.2f %%, perplexity: %.3f", *shown)

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Measure, initialise, observe, quantize, measure; activations may come later."""
        self._measure_once(trainer, task)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._initialise(trainer, task, task.model, reads_grids=False)
        reads_grids = any(i.reads_grids for i in self.initialisers.values())
        reference = deepcopy(task.model) if reads_grids else task.model
        observe(task.model, weight_quants(task.model), data.calibration_batches(1))
        self._initialise(trainer, task, reference, reads_grids=True)
        if task.schedule.activations is None:
            batches = data.calibration_batches(self.num_batches)
            observe(task.model, activation_quants(task.model), batches)
            self.measure("post_training", trainer, task)

    def _initialise(
        self, trainer: pl.Trainer, task: QATTask, reference: nn.Module, *, reads_grids: bool
    ) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        model, device = task.model, task.device
        for initialiser in self.initialisers.values():
            if initialiser.reads_grids is reads_grids:
                assert isinstance(model, Captured)
                assert isinstance(reference, Captured)
                batches = data.calibration_batches(initialiser.num_batches)
                done = initialiser(
                    model, [on_device(batch, device) for batch in batches], reference
                )
                if trainer.is_global_zero:
                    log.info("%s", done)

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has acted, the float accuracies (test, validation), and the scores."""
        baseline = [self.float_accuracy, self.float_val_accuracy]
        scores = {kind: list(found) for kind, found in self.scores.items()}
        return {**super().state_dict(), "baseline": baseline, "scores": scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        found = state_dict["baseline"][1]
        self.float_val_accuracy = None if found is None else float(found)
        scores = state_dict["scores"].items()
        self.scores = {str(kind): Score(*map(float, values)) for kind, values in scores}


class CalibrateActivations(Milestone):
    """Calibrate and quantize activations later than weights, where the schedule says so.

    Args:
        num_batches: Training batches, under evaluation transforms.

    Raises:
        ConfigError: If there are none.
    """

    name = "activations"

    def __init__(self, num_batches: int = 8) -> None:
        super().__init__()
        require("callbacks.activations.num_batches", num_batches, whole(1))
        self.num_batches = num_batches

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Observe, quantize and measure, unless that was done with the weights."""
        if task.schedule.activations is not None:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            batches = data.calibration_batches(self.num_batches)
            observe(task.model, activation_quants(task.model), batches)
            for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, Calibrate):
                    callback.measure("post_training", trainer, task)
