"""The end game: scales stop moving, batch-norms stop following, batch-norms fold into weights."""

from __future__ import annotations

import pytorch_lightning as pl

from qat.batch_norm import freeze_batch_norm
from qat.fake_quant import Phase, fake_quants
from qat.layers import fold
from qat.quantizers import Deployable
from qat.training.callbacks.milestone import Milestone
from qat.training.task import QATTask


class FreezeObservers(Milestone):
    """Keep every scale where it is: observers stop following, learned scales stop learning."""

    name = "freeze_observers"

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Freeze all scales."""
        del trainer
        for fake_quant in fake_quants(task.model):
            fake_quant.set_phase(Phase.FROZEN)


class FreezeBatchNorm(Milestone):
    """Let batch-norms use their running statistics, as they will when deployed."""

    name = "freeze_batch_norm"

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Freeze all statistics."""
        del trainer
        freeze_batch_norm(task.model)


class Fold(Milestone):
    """Enter the fold stage: train the last steps as the exported integers will compute."""

    name = "fold"

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Fold batch-norms into weights and biases onto grids, unless there are no integers."""
        del trainer
        kinds = {f.quantizer.deployable for f in fake_quants(task.model)}
        if Deployable.SIMULATION not in kinds:
            fold(task.model)
