"""The quantized part of a run in miniature: a few steps through all of its milestones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from qat.batch_norm import batch_norms, freeze_batch_norm
from qat.fake_quant import Phase, activation_quants, fake_quants, weight_quants
from qat.layers import fold
from qat.quantizers import Deployable
from qat.training.callbacks.anneal import anneal, anneal_progress
from qat.training.callbacks.calibrate import observe
from qat.training.evaluate import logits_of
from qat.training.optim import parameter_groups, rate_factor
from qat.training.schedule import ORDER
from qat.training.task import Batch, QATTask

DIVERGED = 3.0
"""A loss that is higher than the first one by so much is not trained any further."""


class Miniature:
    """The quantized part of a run in a few steps, on copies of its model.

    Args:
        task: The run, as its quantized part starts; it is not changed.
        batches: Training batches.
        judges: Other training batches, whose mean loss judges.
        clip: Largest norm of gradients, if there is one.
        steps: Optimizer steps; as a run does, they go through few batches again and again.
            ``None``: one for each batch.
    """

    def __init__(
        self,
        task: QATTask,
        batches: Sequence[Batch],
        judges: Sequence[Batch],
        clip: float | None,
        steps: int | None = None,
    ) -> None:
        self.steps = steps or len(batches)
        self.task, self.batches, self.judges, self.clip = task, batches, judges, clip
        self._inputs = [x for x, _ in batches]

    def untrained(self) -> float:
        """Return the loss without steps: batch-norms and observers follow as ever."""
        model = self._copy()
        for _, (x, _) in self._course(model):
            logits_of(model.train(), x)
        return self._judge(model)

    def loss_of(self, rate: float) -> float:
        """Return the loss behind training at ``rate``; infinite where that diverges."""
        task, model, rates = self.task, self._copy(), replace(self.task.rates, qat_lr=rate)
        optimizer = task.make_optimizer(parameter_groups(model, rates))
        peaks: list[float] = [group["lr"] for group in optimizer.param_groups]
        first: float | None = None
        for step, batch in self._course(model):
            factor = rate_factor(step, task.total_steps, task.schedule, rates)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss = self._step(model.train(), optimizer, batch)
            first = loss if first is None else first
            if not loss < first + DIVERGED:
                return math.inf
        return self._judge(model)

    def _course(self, model: nn.Module) -> Iterator[tuple[int, Batch]]:
        """Yield a step of the run and a batch, and take ``model`` through the milestones."""
        for index, batch in enumerate(islice(cycle(self.batches), self.steps)):
            step = self._moment(2 * index / self.steps)
            self._pass_milestones(model, step)
            yield step, batch
        self._pass_milestones(model, self.task.total_steps)

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
        anneal(model, anneal_progress(step, total, schedule))
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
        def closure() -> Any:
            optimizer.zero_grad()
            loss = self.task.loss(logits_of(model, batch[0]), *batch)
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
        losses = [float(self.task.loss(logits_of(model, x), x, y)) for x, y in self.judges]
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf
