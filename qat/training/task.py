"""The LightningModule: loss, metrics and optimizer of a prepared classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from qat.calls import Call
from qat.errors import ConfigError
from qat.fake_quant import Phase, fake_quants, scale_parameters
from qat.functional.affine import full_precision
from qat.graph.plan import Plan
from qat.held import hold
from qat.training.distill import Teacher
from qat.training.evaluate import inference, logits_of
from qat.training.optim import Rates, make_optimizer, rate_factor
from qat.training.phases import is_quantized
from qat.training.sam import SAM
from qat.training.schedule import Schedule

Batch = tuple[Any, Tensor]
METRICS = ("train/loss", "val/accuracy", "val/loss", "val/quantized_accuracy")
"""What is logged, for callbacks to monitor."""


class QATTask(pl.LightningModule):
    """Train a prepared model; its structure is complete before the first step.

    Args:
        model: What ``prepare`` returned.
        plan: The plan of that model.
        schedule: The run's milestones.
        rates: Learning rates and decay.
        optimizer: Makes the optimizer from parameter groups.
        label_smoothing: Of the cross entropy, 0 to 1.
        config: Plain values that describe the run; saved in every checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        schedule: Schedule,
        rates: Rates,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        label_smoothing: float = 0.0,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.schedule = schedule
        self.rates = rates
        self.make_optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.compute: Callable[..., Any] = model.__call__
        """Makes the outputs of training steps; a method, so that no module is listed twice."""
        self.teacher: Teacher | None = None
        """What else the model learns from than labels; no part of the module tree."""
        self.penalties: dict[str, Callable[[], Tensor]] = {}
        """What is added to the loss, by name; each of shape ``()``."""
        self.total_steps = 1
        """Optimizer steps of the whole run; final once the optimizer is configured."""
        self._validation = ExitStack()
        self.val_accuracy = MeanMetric()
        self.val_loss = MeanMetric()
        self.save_hyperparameters({"config": config or {}}, logger=False)

    def forward(self, batch: Any) -> Tensor:
        """Return the logits of a batch ``(N, ...)``, ``(N, K)``, or ``(N * T, K)`` of sequences."""
        return logits_of(self.model, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch, shape ``()``."""
        del batch_idx
        x, y = batch
        loss = self.loss(logits_of(self.compute, x, self.model), x, y)
        for penalty in self.penalties.values():
            loss = loss + penalty()
        self.log("train/loss", loss, prog_bar=True)
        return loss + _touch(scale_parameters(self.model)) if self.trainer.world_size > 1 else loss

    def loss(self, logits: Tensor, x: Any, y: Tensor) -> Tensor:
        """Return what labels and the teacher, if there is one, say of a batch, shape ``()``.

        Args:
            logits: ``(N, K)``.
            x: Inputs of the batch.
            y: Labels, ``N`` in all.
        """
        loss = F.cross_entropy(logits, y.flatten(), label_smoothing=self.label_smoothing)
        return loss if self.teacher is None else self.teacher.mix(loss, logits, x)

    def use_rate(self, qat_lr: float) -> None:
        """Train the quantized part at another rate, from the step on that comes next."""
        self.rates = replace(self.rates, qat_lr=qat_lr)
        step, schedule = self.trainer.global_step, self.schedule
        for group in (g for o in self.trainer.optimizers for g in o.param_groups):
            factor = rate_factor(step, self.total_steps, schedule, self.rates)
            group["lr"] = group["initial_lr"] * factor

    def on_validation_epoch_start(self) -> None:
        """Let weights be made once for all batches."""
        self._validation.enter_context(hold(self.model))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the validation metrics; in full precision, at last on integers."""
        del batch_idx
        x, y = Call.of(batch[0]).map(full_precision), batch[1].flatten()
        with torch.autocast(y.device.type, enabled=False):
            logits = logits_of(inference(self.model), x).float()
        self.val_accuracy.update((logits.argmax(1) == y).float() * 100)
        self.val_loss.update(F.cross_entropy(logits, y, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics; the quantized accuracy only once the model is quantized."""
        self._validation.close()
        accuracy, quantized = self.val_accuracy.compute(), is_quantized(self.model)
        self.log("val/accuracy", accuracy, prog_bar=True)
        self.log("val/loss", self.val_loss.compute())
        shown = accuracy if quantized else torch.zeros_like(accuracy)
        self.log("val/quantized_accuracy", shown, logger=False)  # 0 keeps float epochs from winning
        for logger in self.loggers if quantized else []:
            logger.log_metrics({"val/quantized_accuracy": float(accuracy)}, self.global_step)
        self.val_accuracy.reset()
        self.val_loss.reset()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep momentum from moving scales that are frozen or not yet in use."""
        del optimizer
        for fake_quant in fake_quants(self.model):
            if fake_quant.phase is not Phase.QUANTIZE:
                for parameter in fake_quant.quantizer.parameters():
                    parameter.grad = None

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule.

        Raises:
            ConfigError: If a milestone lies behind the end, or gradients are to be accumulated
                for an optimizer that computes its own.
        """
        self.total_steps = count_steps(self.trainer)
        self.schedule.check_length(self.total_steps)
        optimizer, scheduler = make_optimizer(
            self.model, self.make_optimizer, lambda: self.rates, self.schedule, self.total_steps
        )
        if isinstance(optimizer, SAM) and self.trainer.accumulate_grad_batches > 1:
            raise ConfigError(
                "expected trainer.accumulate_grad_batches=1 with optimizer=sam, got "
                f"{self.trainer.accumulate_grad_batches}: its second pass would replace the sum of "
                "gradients; raise data.batch_size instead."
            )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _touch(parameters: list[nn.Parameter]) -> Tensor | float:
    """Return 0 with every parameter in its graph: the reducers of several processes wait for all.

    Scales are not in use in all phases, and without a gradient where they are frozen.
    """
    learning = [p.requires_grad for p in parameters]
    total = 0.0 * sum(p.requires_grad_(True).sum() for p in parameters)
    for parameter, flag in zip(parameters, learning, strict=True):
        parameter.requires_grad_(flag)
    return total


def count_steps(trainer: pl.Trainer) -> int:
    """Return the optimizer steps of a whole run.

    Lightning's own count builds the training loader before a checkpoint is restored, and then
    never gives the loader its saved place: a resumed epoch would start from its first batch.
    """
    data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    if data is None:
        return int(trainer.estimated_stepping_batches)
    batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
