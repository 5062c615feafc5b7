"""Distillation: keep a copy of the float model when quantization starts, and let it teach."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from qat.errors import ConfigError
from qat.training.callbacks.milestone import Milestone
from qat.training.distill import Teacher
from qat.training.task import QATTask


class Distill(Milestone):
    """Make the float model the teacher, in front of its calibration; its tensors are saved.

    Args:
        weight: Share of the distillation loss, 0 to 1.
        temperature: Softens the classes of teacher and student.

    Raises:
        ConfigError: If a value is out of range.
    """

    name = "calibrate"
    title = "distill"

    def __init__(self, weight: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 <= weight <= 1 or temperature <= 0:
            raise ConfigError(
                "expected distillation.weight from 0 to 1 and distillation.temperature > 0, got "
                f"{weight} and {temperature}: correct them."
            )
        self.weight, self.temperature = weight, temperature
        self.teacher: dict[str, Tensor] | None = None

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Copy the model as it is, before anything quantizes, if something will learn from it."""
        del trainer
        if task.schedule.epochs == 0:
            return
        self.teacher = {name: value.clone() for name, value in task.model.state_dict().items()}
        self._teach(task)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring a resumed run's teacher back; where nothing is trained, nobody needs one."""
        del trainer
        assert isinstance(pl_module, QATTask)
        if self.teacher is not None:
            self._teach(pl_module)

    def _teach(self, task: QATTask) -> None:
        assert self.teacher is not None
        model = deepcopy(task.model).requires_grad_(False)
        model.load_state_dict(self.teacher)  # phases too: a teacher never quantizes
        task.teacher = Teacher(model.eval(), self.weight, self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the teacher was made, and its tensors."""
        return {**super().state_dict(), "teacher": self.teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        self.teacher = state_dict["teacher"]
