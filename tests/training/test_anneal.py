from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from qat.compose import compose_plain
from qat.fake_quant import fake_quants
from qat.quantizers import LSQ, QUANTIZERS
from qat.restore import finish
from qat.training.callbacks import Anneal, Calibrate, Fold, FreezeObservers
from qat.training.callbacks.anneal import anneal, anneal_progress
from qat.training.schedule import Schedule
from tests.helpers import calibrate
from tests.training.small import STEPS, Data, Save, fit, make_task, same


class Soft(LSQ):
    """An LSQ that remembers how far it was told to be."""

    told: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("told", torch.tensor(-1.0))

    def anneal(self, progress: float) -> None:
        self.told.fill_(progress)


@pytest.fixture(autouse=True)
def _soft(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "soft", Soft)


FIELDS = {"quantizer": "soft", "observer": "min_max"}


def told(task):
    (value,) = {float(f.quantizer.told) for f in fake_quants(task.model)}
    return value


class Watch(pl.Callback):
    def __init__(self):
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(told(pl_module))


def test_progress_runs_from_calibration_to_frozen_scales():
    schedule = Schedule(float_epochs=1, epochs=4, calibrate=0.25, freeze_observers=0.5)
    seen = [anneal_progress(step, 100, schedule) for step in (0, 20, 40, 45, 50, 59, 60, 99)]
    assert seen == [0.0, 0.0, 0.0, 0.25, 0.5, 0.95, 1.0, 1.0]
    at_once = Schedule(epochs=1, freeze_observers=0)
    assert anneal_progress(0, 10, at_once) == 1.0


def test_every_step_is_told_once_and_the_end_is_hard():
    task, watch = make_task(schedule=Schedule(0, 5), quantizer=FIELDS), Watch()
    fit(task, Anneal(), Calibrate(2), watch)
    assert watch.seen == pytest.approx([min(s / 20, 1.0) for s in range(STEPS)])
    assert watch.seen[20] == 1.0


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_that_ends_early_ends_hard(epochs):
    task = make_task(schedule=Schedule(0, 0 if epochs == 0 else 5), quantizer=FIELDS)
    fit(task, Anneal(), Calibrate(2), FreezeObservers(), Fold(), epochs=epochs)
    assert told(task) == 1.0


def test_a_quantizer_with_nothing_to_sharpen_is_left_out(monkeypatch):
    task = make_task()
    for fake_quant in fake_quants(task.model):
        monkeypatch.setattr(fake_quant.quantizer, "anneal", None)  # not callable
    anneal(task.model, 0.5)


def test_a_resumed_run_ends_like_one_that_was_not_cut(tmp_path):
    whole, resumed = make_task(quantizer=FIELDS), make_task(quantizer=FIELDS)
    fit(whole, Anneal(), Calibrate(2), Save(tmp_path / "cut.ckpt"))
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)["state_dict"]
    assert {float(v) for k, v in saved.items() if k.endswith("told")} == {float(torch.tensor(0.75))}
    fit(resumed, Anneal(), Calibrate(2), resume=tmp_path / "cut.ckpt")
    assert same(whole.model, resumed.model)


def test_a_model_that_is_finished_from_a_checkpoint_is_hard():
    task = make_task(quantizer=FIELDS)
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    finish(task.model)  # pyright: ignore[reportArgumentType]
    assert told(task) == 1.0


def test_it_is_on_by_default_in_front_of_calibration():
    names = [k for k, v in compose_plain(["recipe=resnet_w4a4"])["callbacks"].items() if v]
    assert names.index("anneal") < names.index("calibrate")
