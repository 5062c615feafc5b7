"""A milestone acts once: at its step, or where training ends before it."""

from types import SimpleNamespace
from typing import Any

import pytest

from qat.training.callbacks.milestone import Milestone
from qat.training.schedule import Schedule
from tests.training.small import make_task


class Act(Milestone):
    """Note the steps at which it acts."""

    name = "freeze_batch_norm"

    def __init__(self):
        super().__init__()
        self.steps: list[int] = []

    def act(self, trainer, task):
        self.steps.append(trainer.global_step)


class Titled(Act):
    title = "do_it"


@pytest.fixture(scope="module")
def task() -> Any:
    task = make_task(schedule=Schedule(0, 5, freeze_observers=2, freeze_batch_norm=7, fold=9))
    task.total_steps = 40
    return task


def at(step: int, *, epochs: int = 5, first: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_epochs=epochs, is_global_zero=first)


@pytest.mark.parametrize("steps", [range(20), range(0, 20, 2), range(9, 20)], ids=str)
def test_it_acts_at_the_first_step_that_is_late_enough(task, steps):
    milestone = Act()
    milestone.on_fit_start(at(0), task)
    for step in steps:
        milestone.on_train_batch_start(at(step), task, None, 0)
    milestone.on_train_end(at(20), task)
    assert milestone.steps == [next(step for step in steps if step >= 7)]


def test_what_is_open_when_training_ends_is_done_then(task):
    milestone = Act()
    milestone.on_train_batch_start(at(6), task, None, 0)
    milestone.on_train_end(at(6), task)
    milestone.on_train_end(at(6), task)
    assert milestone.steps == [6]
    without = Act()
    without.on_fit_start(at(0, epochs=0), task)
    assert without.steps == [0]


def test_whether_it_has_acted_is_saved(task):
    milestone, resumed = Act(), Act()
    assert milestone.state_dict() == {"done": False}
    milestone.on_train_batch_start(at(7), task, None, 0)
    assert milestone.state_dict() == {"done": True}
    resumed.load_state_dict(milestone.state_dict())
    resumed.on_train_batch_start(at(8), task, None, 0)
    assert resumed.steps == []


def test_the_first_process_says_so(task, caplog):
    with caplog.at_level("INFO", "qat"):
        for milestone, first in ((Act(), True), (Titled(), True), (Act(), False)):
            milestone.on_train_batch_start(at(7, first=first), task, None, 0)
    assert caplog.messages == ["step 7: freeze batch norm", "step 7: do it"]
