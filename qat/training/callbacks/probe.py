"""A learning rate found by trying: the quantized part in miniature, on copies of the model.

A rate that suits live batch-norms can be far too high once they are frozen. While they live, a step
that moves the mean or the spread of a channel is undone by the normalisation; then it is not, and
where inputs are not centred (pixels from 0 to 255) the loss is steep in just these directions. So
every rate goes through all milestones of the schedule, and is judged in the fold stage.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils._pytree import tree_leaves, tree_map

from qat.kinds import require, whole
from qat.training.callbacks.milestone import Milestone
from qat.training.callbacks.miniature import Miniature
from qat.training.task import Batch, QATTask

log = logging.getLogger("qat")
STEP_DOWN = 0.25
"""Each rate that is tried is this much of the one before."""
MOST_RATES = 10
ENOUGH = 0.9
"""Share of the best gain that a lower rate has to reach."""
CLEAR = 0.1
"""Share of the loss that a gain is, where few samples tell good rates from others."""

MOST_BYTES = 2**29
"""Of all inputs that a probe reads: large images come in smaller batches."""
LEAST_SAMPLES = 16
"""Of a batch, even so."""


def lower_rates(highest: float) -> list[float]:
    """Return the rates to try, from the highest down, such as 0.02, 0.005, 0.00125 ..."""
    return [float(f"{highest * STEP_DOWN**i:.4g}") for i in range(MOST_RATES)]


def descend(
    rates: Iterable[float], loss_of: Callable[[float], float], untrained: float
) -> dict[float, float]:
    """Try rates from high to low, until one gains much less than the best.

    While the best gains little, two in a row have to: by chance a rate that is too high may gain
    some, and the next one less, where one further down gains many times as much.

    Args:
        rates: From high to low.
        loss_of: Returns the loss of a rate; infinite where it diverges.
        untrained: The loss without a step.

    Returns:
        The loss of every rate that was tried.
    """
    tried: dict[float, float] = {}
    worse = 0
    for rate in rates:
        tried[rate] = loss_of(rate)
        best = untrained - min(tried.values())
        worse = worse + 1 if best > 0 and untrained - tried[rate] < ENOUGH * best else 0
        if worse >= (1 if best >= CLEAR * untrained else 2):
            break
    return tried


def choose(tried: Mapping[float, float], untrained: float) -> float:
    """Return the lowest rate that gains nearly as much as the best; the lowest of all if none does.

    A run has many more steps than a probe, so that a rate which is high enough here is so there; on
    samples that the float model knows by heart, rates that are too high look no worse.

    Args:
        tried: Loss by rate.
        untrained: The loss without a step.
    """
    best = untrained - min(tried.values())
    if best <= 0:
        return min(tried)
    return min(rate for rate, loss in tried.items() if untrained - loss >= ENOUGH * best)


def _num_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(batch[0]))


def _to(device: torch.device, batches: list[Batch]) -> list[Batch]:
    return tree_map(lambda tensor: tensor.to(device), batches)


class ProbeRate(Milestone):
    """Choose ``qat_lr`` where it says ``up to 0.02``, as the quantized part starts.

    Stand behind what calibrates: as a rule that acts in front of the same step.
    Rates are tried from the highest down, on training batches alone. What is chosen, and the loss
    of every rate that was tried, is part of the saved state, so that a resumed run takes the same.

    Args:
        num_batches: Training batches, and optimizer steps, that each rate gets.
        num_judges: Other training batches, without augmentation, that judge it.

    Raises:
        ConfigError: If there are none.
    """

    title = "probe the rate"

    def __init__(self, num_batches: int = 32, num_judges: int = 4) -> None:
        super().__init__()
        require("callbacks.probe_rate.num_batches", num_batches, whole(1))
        require("callbacks.probe_rate.num_judges", num_judges, whole(1))
        self.num_batches, self.num_judges = num_batches, num_judges
        self.tried: dict[float, float] = {}
        """Loss in miniature by rate, from the highest rate down; empty where a rate was given."""
        self.untrained = math.nan
        """The same without a step."""

    @property
    def chosen(self) -> float | None:
        """The rate that the run takes, if one was looked for."""
        return choose(self.tried, self.untrained) if self.tried else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring a resumed run's rate back."""
        del trainer
        assert isinstance(pl_module, QATTask)
        if self.chosen is not None and pl_module.rates.is_probed:
            pl_module.rates = replace(pl_module.rates, qat_lr=self.chosen)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Act in front of the first step of the quantized part, if no rate was given."""
        del batch, batch_idx
        assert isinstance(pl_module, QATTask)
        start = pl_module.schedule.start(pl_module.total_steps)
        if pl_module.rates.is_probed and trainer.global_step >= start:
            self._act_once(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: without a quantized step there is no rate."""

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Try rates, and train at the best."""
        begun = time.perf_counter()
        batches, judges = self._batches(trainer, task)
        small = Miniature(task, batches, judges, trainer.gradient_clip_val, steps=self._steps(task))
        teacher = task.teacher
        task.teacher = teacher and teacher.remembering(MOST_BYTES)
        with torch.random.fork_rng(), torch.autocast(task.device.type, enabled=False):
            rates = lower_rates(task.rates.highest)
            self.untrained = small.untrained()
            self.tried = descend(rates, small.loss_of, self.untrained)
        task.teacher = teacher
        self.tried, self.untrained = trainer.strategy.broadcast((self.tried, self.untrained))
        assert self.chosen is not None
        task.use_rate(self.chosen)
        if trainer.is_global_zero:
            shown = ", ".join(f"{rate:g} {loss:.4g}" for rate, loss in self.tried.items())
            log.info("loss without training %.4g, at each rate: %s", self.untrained, shown)
            log.info("rates were tried in %.1f s", time.perf_counter() - begun)
            log.info("training at %g; optimizer.rates.qat_lr=... sets another", self.chosen)
            if min(self.tried.values()) >= self.untrained:
                log.warning("no rate that was tried gains over calibration alone")

    def _batches(self, trainer: pl.Trainer, task: QATTask) -> tuple[list[Batch], list[Batch]]:
        """Return batches to step on and others that judge, smaller ones where samples are large."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        count = self._steps(task) + self.num_judges
        (first,) = data.labelled_batches(1)
        size = len(first[1])
        most = min(size, max(LEAST_SAMPLES, MOST_BYTES * size // (_num_bytes(first) * count)))
        plain = data.labelled_batches(count, most=most)
        if len(plain) == 1:  # a judge of its own, even so
            most = max(1, most // 2)
            plain = data.labelled_batches(count, most=most)
        judges = min(self.num_judges, max(1, len(plain) // 2))
        seen = data.labelled_batches(max(1, len(plain) - judges), most=most, augmented=True)
        return _to(task.device, seen), _to(task.device, plain[-judges:])

    def _steps(self, task: QATTask) -> int:
        return min(self.num_batches, task.total_steps - task.schedule.start(task.total_steps))

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has acted, and the losses."""
        return {**super().state_dict(), "tried": dict(self.tried), "untrained": self.untrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        self.tried = {float(rate): float(loss) for rate, loss in state_dict["tried"].items()}
        self.untrained = float(state_dict["untrained"])
