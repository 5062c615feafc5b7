"""Distillation: a float model, as a rule the run's own, teaches what quantization starts from."""

from __future__ import annotations

from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from qat.errors import ConfigError
from qat.kinds import FILE, FLAG, FRACTION, NULL, TEXT, WORD, number, require_all
from qat.layers import QuantizedLayer
from qat.models import build, load_checkpoint
from qat.training.callbacks.milestone import Milestone
from qat.training.distill import Features, Teacher
from qat.training.task import QATTask
from qat.training.teacher_cache import TeacherCache, check_misses

KINDS = {
    "weight": FRACTION,
    "temperature": number(above=0),
    "model": WORD | NULL,
    "ckpt": FILE | NULL,
    "features": TEXT,
    "feature_weight": number(0),
    "cache": FLAG,
}


class Distill(Milestone):
    """Make the teacher when quantization starts, in front of calibration; its tensors are saved.

    Args:
        weight: Share of the distillation loss, 0 to 1.
        temperature: Softens the classes of teacher and student.
        model: Name of another model as the teacher, with ``ckpt``; ``None`` for the float model
            as it is when quantization starts.
        ckpt: The other model's float checkpoint.
        features: Glob patterns of module names whose outputs are compared, separated by ``|``.
        feature_weight: What that loss is multiplied by.
        cache: Whether the teacher's logits of all training samples are computed once, by every
            process, and looked up in each step; for samples that are the same in every epoch.

    Raises:
        ConfigError: If a value is out of range, or one of ``model`` and ``ckpt`` is missing, or
            features, which are not kept, are to be compared with ``cache``.
    """

    name = "calibrate"
    title = "distill"

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 1.0,
        model: str | None = None,
        ckpt: str | None = None,
        features: str = "",
        feature_weight: float = 1.0,
        cache: bool = False,
    ) -> None:
        super().__init__()
        values = {"weight": weight, "temperature": temperature, "feature_weight": feature_weight}
        values |= {"model": model, "ckpt": ckpt, "features": features, "cache": cache}
        require_all("distillation.", values, KINDS)
        if (model is None) is not (ckpt is None):
            raise ConfigError(
                "expected distillation.model and distillation.ckpt together, got "
                f"{model} and {ckpt}: give both for another teacher, or none."
            )
        if cache and features:
            raise ConfigError(
                "expected no distillation.features with distillation.cache=true, got "
                f"'{features}': logits alone are kept; set distillation=logits or "
                "distillation.cache=false."
            )
        self.weight, self.temperature = weight, temperature
        self.model, self.ckpt = model, ckpt
        self.features, self.feature_weight = features, feature_weight
        self.cache = cache
        self.teacher: dict[str, Tensor] | None = None

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Copy or load the teacher before anything quantizes, if something will learn from it."""
        if task.schedule.epochs == 0:
            return
        model = self._untaught(trainer, task)
        if self.ckpt is not None:
            load_checkpoint(model, self.ckpt)
        self.teacher = {name: value.clone() for name, value in model.state_dict().items()}
        self._teach(model, trainer, task)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring a resumed run's teacher back; where nothing is trained, nobody needs one.

        Raises:
            ConfigError: If logits cannot be looked up, as samples differ from epoch to epoch.
        """
        assert isinstance(pl_module, QATTask)
        if self.cache and pl_module.schedule.epochs > 0:
            _check_repeats(trainer)
        if self.teacher is not None:
            model = self._untaught(trainer, pl_module)
            model.load_state_dict(self.teacher)  # phases too: a teacher never quantizes
            self._teach(model, trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for unknown samples in front of the validation that saves a checkpoint."""
        self._check_misses(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for unknown samples in an epoch without validation, too."""
        self._check_misses(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act if the moment never came, and stop looking at the student's features."""
        super().on_train_end(trainer, pl_module)
        assert isinstance(pl_module, QATTask)
        if pl_module.teacher is not None and pl_module.teacher.features is not None:
            pl_module.teacher.features[0].remove()

    def _untaught(self, trainer: pl.Trainer, task: QATTask) -> nn.Module:
        if self.model is None:
            return deepcopy(task.model)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        return build(self.model, data.num_classes).to(task.device)

    def _check_misses(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, QATTask)
        cache = pl_module.teacher.model if pl_module.teacher is not None else None
        if isinstance(cache, TeacherCache):
            check_misses(trainer.strategy.reduce(cache.misses.clone(), reduce_op="sum"))

    def _teach(self, model: nn.Module, trainer: pl.Trainer, task: QATTask) -> None:
        model.requires_grad_(False).eval()
        if self.cache:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            cache = TeacherCache(model, data.training_inputs())
            task.teacher = Teacher(cache, self.weight, self.temperature)
            return
        paths, features = self._paths(task.model, model), None
        if paths:
            features = Features(task.model, paths), Features(model, paths)
        task.teacher = Teacher(model, self.weight, self.temperature, features, self.feature_weight)

    def _paths(self, student: nn.Module, teacher: nn.Module) -> list[str]:
        """Return the modules that are compared; a convolution becomes another one at the fold."""
        patterns = [p.strip() for p in self.features.split("|") if p.strip()]
        theirs = {name for name, _ in teacher.named_modules()}
        paths = [
            name
            for name, module in student.named_modules()
            if any(fnmatchcase(name, p) for p in patterns)
            and name in theirs
            and not (isinstance(module, QuantizedLayer) and module.links.batch_norm is not None)
        ]
        if patterns and not paths:
            raise ConfigError(
                f"expected distillation.features='{self.features}' to match modules of student and "
                "teacher, other than layers in front of a batch-norm, got none: correct the "
                "patterns."
            )
        return paths

    def state_dict(self) -> dict[str, Any]:
        """Return whether the teacher was made, and its tensors."""
        return {**super().state_dict(), "teacher": self.teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        self.teacher = state_dict["teacher"]


def _check_repeats(trainer: pl.Trainer) -> None:
    data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    if data.is_random:
        raise ConfigError(
            "expected training samples that are the same in every epoch with "
            "distillation.cache=true, got ones that are augmented, or windows that move: set "
            "data.augment=none where the data set has that, or distillation.cache=false."
        )
