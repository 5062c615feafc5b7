"""A run walks through every phase: what quantizes, learns, observes, and stands still in each."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.fake_quant import activation_quants, weight_quants
from qat.training.callbacks import (
    Calibrate,
    CalibrateActivations,
    Fold,
    FreezeBatchNorm,
    FreezeObservers,
    LowerBits,
)
from qat.training.phases import phase_of
from qat.training.schedule import Schedule
from tests.training.small import EPOCHS, fit, make_task

FOLLOWING = {"quantizer": "uniform", "observer": "moving_average"}
SCHEDULE = Schedule(
    float_epochs=1,
    epochs=EPOCHS - 1,
    activations=4,
    bits={8: 0, 4: 8},
    freeze_observers=16,
    freeze_batch_norm=20,
    fold=26,
)
PHASES = (
    ["float"] * 8
    + ["quantize_weights"] * 4
    + ["quantize"] * 12
    + ["freeze_observers"] * 4
    + ["freeze_batch_norm"] * 6
    + ["fold"] * 6
)
"""Behind the 8 float steps, milestones count from 0: 4, 16, 20 and 26."""
MOVES = {
    "float": {"weight", "batch_norm"},
    "quantize_weights": {"weight", "batch_norm", "learned"},
    "quantize": {"weight", "batch_norm", "learned", "observed"},
    "freeze_observers": {"weight", "batch_norm"},
    "freeze_batch_norm": {"weight"},
    "fold": {"weight"},
}
"""What changes in a step of each phase; nothing else does."""
KINDS = {
    "weight": "weight",
    "running_mean": "batch_norm",
    "learned_scale": "learned",
    "observed_scale": "observed",
}
"""Last part of a name in the state → what it is."""


class Watch(pl.Callback):
    """The phase of every step, and what has moved when it ends."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.moved: list[set[str]] = []
        self.bits: list[set[int]] = []
        self.before: Mapping[str, Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module: Any, batch, batch_idx) -> None:
        model = pl_module.model
        self.phases.append(phase_of(model))
        self.bits.append({q.bits for q in [*weight_quants(model), *activation_quants(model)]})
        self.before = {k: v.clone() for k, v in model.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module: Any, outputs, batch, batch_idx) -> None:
        after = pl_module.model.state_dict()
        names = [k for k, v in self.before.items() if not torch.equal(v, after[k])]
        ends = {name.rpartition(".")[2] for name in names}
        self.moved.append({kind for end, kind in KINDS.items() if end in ends})


@pytest.fixture(scope="module")
def watch() -> Watch:
    watch = Watch()
    optimizer: Any = partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    task = make_task(4, SCHEDULE, optimizer=optimizer, activation=FOLLOWING)
    milestones = [
        LowerBits(2),
        Calibrate(2),
        CalibrateActivations(2),
        FreezeObservers(),
        FreezeBatchNorm(),
        Fold(),
    ]
    fit(task, *milestones, watch)
    return watch


def test_every_phase_begins_where_the_schedule_says(watch):
    assert watch.phases == PHASES


@pytest.mark.parametrize("phase", MOVES)
def test_what_moves_in_each_phase_and_what_stands_still(watch, phase):
    steps = [moved for at, moved in zip(watch.phases, watch.moved, strict=True) if at == phase]
    assert len(steps) >= 4
    assert all(moved == MOVES[phase] for moved in steps), steps


def test_bits_fall_in_the_middle_of_the_quantized_phase(watch):
    assert watch.bits == [{8}] * 16 + [{4}] * 24
