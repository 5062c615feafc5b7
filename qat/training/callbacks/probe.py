"""A learning rate found by trying: the quantized part in miniature, on copies of the model.

A rate that suits live batch-norms can be far too high once they are frozen. While they live, a step
that moves the mean or the spread of a channel is undone by the normalisation; then it is not, and
where inputs are not centred (pixels from 0 to 255) the loss is steep in just these directions. So
every rate goes through all milestones of the schedule, and is judged in the fold stage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qat.batch_norm import batch_norms, freeze_batch_norm
from qat.fake_quant import Phase, activation_quants, fake_quants, weight_quants
from qat.kinds import require, whole
from qat.layers import fold
from qat.quantizers import Deployable
from qat.training.callbacks.calibrate import observe
from qat.training.callbacks.milestone import Milestone
from qat.training.evaluate import first_output
from qat.training.optim import parameter_groups, rate_factor
from qat.training.schedule import ORDER
from qat.training.task import QATTask

log = logging.getLogger("qat")
Batch = tuple[Tensor, Tensor]
STEP_DOWN = 0.25
"""Each rate that is tried is this much of the one before."""
MOST_RATES = 10
DIVERGED = 3.0
"""A loss that is higher than the first one by so much is not trained any further."""


def lower_rates(highest: float) -> list[float]:
    """Return the rates to try, from the highest down, such as 0.02, 0.005, 0.00125 ..."""
    return [float(f"{highest * STEP_DOWN**i:.4g}") for i in range(MOST_RATES)]


def descend(
    rates: Iterable[float], loss_of: Callable[[float], float], untrained: float
) -> dict[float, float]:
    """Try rates from high to low, until one gains, and the next one gains less.

    Args:
        rates: From high to low.
        loss_of: Returns the loss of a rate; infinite where it diverges.
        untrained: The loss without a step.

    Returns:
        The loss of every rate that was tried; the rate to take has the lowest.
    """
    tried: dict[float, float] = {}
    for rate in rates:
        best = min(tried.values(), default=math.inf)
        tried[rate] = loss_of(rate)
        if best < untrained and tried[rate] >= best:
            break
    return tried


class Miniature:
    """The quantized part of a run in a few steps, on copies of its model.

    Args:
        task: The run, as its quantized part starts; it is not changed.
        batches: Training batches, one for each step.
        judges: Other training batches, whose mean loss judges.
        clip: Largest norm of gradients, if there is one.
    """

    def __init__(
        self, task: QATTask, batches: Sequence[Batch], judges: Sequence[Batch], clip: float | None
    ) -> None:
        self.task, self.batches, self.judges, self.clip = task, batches, judges, clip
        self._inputs = [x for x, _ in batches]

    def untrained(self) -> float:
        """Return the loss that the last stage has without a step."""
        model = self._copy()
        self._pass_milestones(model, self.task.total_steps)
        return self._judge(model)

    def loss_of(self, rate: float) -> float:
        """Return the loss behind training at ``rate``; infinite where that diverges."""
        task, model = self.task, self._copy()
        rates = replace(task.rates, qat_lr=rate)
        optimizer = task.make_optimizer(parameter_groups(model, rates))
        peaks, first = [group["lr"] for group in optimizer.param_groups], math.nan
        for index, batch in enumerate(self.batches):
            step = self._moment(2 * index / len(self.batches))
            self._pass_milestones(model, step)
            factor = rate_factor(step, task.total_steps, task.schedule, rates)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss = self._step(model.train(), optimizer, batch)
            first = loss if index == 0 else first
            if not loss < first + DIVERGED:
                return math.inf
        self._pass_milestones(model, task.total_steps)
        return self._judge(model)

    def _copy(self) -> nn.Module:
        """Return the model, every site with its own bits, where a schedule lowers them."""
        model = deepcopy(self.task.model)
        for norm in batch_norms(model):
            norm.synchronised = False
        for quants, count in ((weight_quants(model), 1), (activation_quants(model), None)):
            wide = [quant for quant in quants if quant.bits != quant.own_bits]
            for quant in wide:
                quant.use_bits(quant.own_bits)
            if active := [quant for quant in wide if quant.active]:
                observe(model, active, self._inputs[:count])
        return model

    def _moment(self, half: float) -> int:
        """Return the step of the run that a moment of the miniature stands for.

        Args:
            half: 0 to 1 until batch-norms are frozen, 1 to 2 behind that, where a rate is more
                often too high: half of the steps are there.
        """
        schedule, total = self.task.schedule, self.task.total_steps
        start, middle = schedule.start(total), min(schedule.step("freeze_batch_norm", total), total)
        if half < 1:
            return start + int(half * (middle - start))
        return middle + int((half - 1) * (total - middle))

    def _pass_milestones(self, model: nn.Module, step: int) -> None:
        """Do what the schedule has up to ``step``, and what is still to be done of it."""
        schedule, total = self.task.schedule, self.task.total_steps
        passed = {name for name in ORDER if schedule.step(name, total) <= step}
        weights, activations = weight_quants(model), activation_quants(model)
        for name, quants in (("calibrate", weights), ("activations", activations)):
            waiting = [quant for quant in quants if not quant.active]
            if name in passed and waiting:
                observe(model, waiting, self._inputs)
        if "freeze_observers" in passed:
            for quant in fake_quants(model):
                quant.set_phase(Phase.FROZEN)
        if "freeze_batch_norm" in passed:
            freeze_batch_norm(model)
        kinds = {quant.quantizer.deployable for quant in fake_quants(model)}
        if "fold" in passed and Deployable.SIMULATION not in kinds:
            fold(model)

    def _step(self, model: nn.Module, optimizer: Optimizer, batch: Batch) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.task.loss(first_output(model(batch[0])), *batch)
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            return loss

        loss: Any = optimizer.step(closure)
        return loss.item()

    @torch.no_grad()
    def _judge(self, model: nn.Module) -> float:
        """Return the mean loss of ``model`` in eval mode; infinite where it is no number."""
        model.eval()
        losses = [float(self.task.loss(first_output(model(x)), x, y)) for x, y in self.judges]
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf


def _to(device: torch.device, batch: Batch) -> Batch:
    return batch[0].to(device), batch[1].to(device)


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

    @property
    def chosen(self) -> float | None:
        """The rate of the lowest loss."""
        return min(self.tried, key=lambda rate: self.tried[rate], default=None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring a resumed run's rate back."""
        del trainer
        assert isinstance(pl_module, QATTask)
        if self.chosen is not None and pl_module.rates.is_probed:
            pl_module.rates = replace(pl_module.rates, qat_lr=self.chosen)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Act in front of the first step of the quantized part."""
        del batch, batch_idx
        assert isinstance(pl_module, QATTask)
        start = pl_module.schedule.start(pl_module.total_steps)
        if not self.done and trainer.global_step >= start:
            self._act_once(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: without a quantized step there is no rate."""

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Try rates, if none was given, and use the best."""
        if not task.rates.is_probed:
            return
        batches, judges = self._batches(trainer, task)
        small = Miniature(task, batches, judges, trainer.gradient_clip_val)
        with torch.random.fork_rng(), torch.autocast(task.device.type, enabled=False):
            rates = lower_rates(task.rates.highest)
            self.tried = descend(rates, small.loss_of, small.untrained())
        self.tried = trainer.strategy.broadcast(self.tried)
        assert self.chosen is not None
        task.use_rate(self.chosen)
        if trainer.is_global_zero:
            shown = ", ".join(f"{rate:g} {loss:.4g}" for rate, loss in self.tried.items())
            log.info("rates tried in %d steps, and the loss of each: %s", len(batches), shown)
            log.info("training at %g; optimizer.rates.qat_lr=... sets another", self.chosen)

    def _batches(self, trainer: pl.Trainer, task: QATTask) -> tuple[list[Batch], list[Batch]]:
        """Return batches to step on, and others that judge, unless there are too few."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        steps = min(self.num_batches, task.total_steps - task.schedule.start(task.total_steps))
        plain = data.labelled_batches(steps + self.num_judges)
        judges = plain[-self.num_judges :]
        seen = data.labelled_batches(max(1, min(steps, len(plain) - len(judges))), augmented=True)
        return [_to(task.device, batch) for batch in seen], [_to(task.device, b) for b in judges]

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has acted, and the losses by rate."""
        return {**super().state_dict(), "tried": dict(self.tried)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        self.tried = {float(rate): float(loss) for rate, loss in state_dict["tried"].items()}
