from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from qat.errors import ConfigError
from qat.training.callbacks import (
    EMA,
    Calibrate,
    CalibrateActivations,
    Fold,
    FreezeBatchNorm,
    FreezeObservers,
    FreezeOscillations,
)
from qat.training.phases import phase_of
from qat.training.schedule import Schedule
from tests.training.small import Save, fit, make_task, same


def milestones():
    return [Calibrate(2), CalibrateActivations(2), FreezeObservers(), FreezeBatchNorm(), Fold()]


def parameters(task) -> Any:
    return {n: p.detach().clone() for n, p in task.named_parameters()}


class Watch(pl.Callback):
    """Note the parameters behind every step, and those that are validated."""

    def __init__(self):
        self.steps: list[Any] = []
        self.validated: list[Any] = []
        self.phases: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(parameters(pl_module))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validated.append(parameters(pl_module))
        self.phases.append(phase_of(pl_module.model))


def test_averages_follow_the_formula_from_the_first_quantized_step():
    schedule = Schedule(float_epochs=1, epochs=4, activations=0.25)
    task, watch = make_task(schedule=schedule), Watch()
    fit(task, EMA(0.6), *milestones(), watch)
    start = 8 + 8  # a float epoch, and one with quantized weights only
    average = watch.steps[start]
    assert any("learned_scale" in name for name in average)
    for count, live in enumerate(watch.steps[start + 1 :], 1):
        kept = min(0.6, (1 + count) / (10 + count))
        average = {n: torch.lerp(v, live[n], 1 - kept) for n, v in average.items()}
    ended = parameters(task)
    assert all(torch.equal(v, average[n]) for n, v in ended.items())
    assert all(torch.equal(v, watch.validated[0][n]) for n, v in watch.steps[7].items())
    assert watch.phases[-1] == phase_of(task.model) == "fold"
    assert all(torch.equal(v, ended[n]) for n, v in watch.validated[-1].items())


def test_training_itself_does_not_change():
    runs = []
    for ema in ([], [EMA(0.6)]):
        watch = Watch()
        fit(make_task(), *ema, *milestones(), watch)
        runs.append(watch)
    for a, b in zip(runs[0].steps, runs[1].steps, strict=True):
        assert all(torch.equal(v, b[n]) for n, v in a.items())
    assert any(not torch.equal(v, runs[1].validated[1][n]) for n, v in runs[0].validated[1].items())


def test_a_resumed_run_ends_like_one_that_was_not_cut(tmp_path):
    whole, resumed, watch = make_task(), make_task(), Watch()
    fit(whole, EMA(0.6), *milestones(), watch, Save(tmp_path / "cut.ckpt"))
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    averages, live = (saved["callbacks"]["EMA"][key] for key in ("averages", "live"))
    assert all(torch.equal(v, saved["state_dict"][n]) for n, v in averages.items())
    assert all(torch.equal(v, watch.validated[1][n]) for n, v in averages.items())
    assert all(torch.equal(v, watch.steps[15][n]) for n, v in live.items())
    fit(resumed, EMA(0.6), *milestones(), resume=tmp_path / "cut.ckpt")
    assert same(whole.model, resumed.model)


def test_frozen_weights_are_averaged_where_they_are_held():
    task, freeze, watch = make_task(2), FreezeOscillations(0.15, 0.05, 0.2), Watch()
    fit(task, freeze, EMA(0.0), *milestones(), watch)
    assert freeze.found["0"].frozen.any()
    assert all(torch.equal(v, watch.steps[-1][n]) for n, v in parameters(task).items())


def test_a_run_that_is_never_quantized_has_no_averages():
    task, ema, watch = make_task(schedule=Schedule(float_epochs=4, epochs=1)), EMA(), Watch()
    fit(task, ema, watch, epochs=2)
    assert not ema.averages
    assert all(torch.equal(v, watch.steps[-1][n]) for n, v in parameters(task).items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_values_that_make_no_sense(decay):
    with pytest.raises(ConfigError, match=r"callbacks\.ema\.decay .* at least 0 and below 1"):
        EMA(decay)
