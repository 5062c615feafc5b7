"""Compiled steps: the same training up to the order of sums, one graph in every phase."""

import pytest
import torch
from torch._dynamo.utils import counters

from qat.errors import ConfigError
from qat.training.callbacks import (
    Calibrate,
    CalibrateActivations,
    Fold,
    FreezeBatchNorm,
    FreezeObservers,
)
from qat.training.compiled import training_forward
from qat.training.schedule import Schedule
from tests.training.small import EPOCHS, fit, make_task

SCHEDULE = Schedule(
    1, EPOCHS - 1, freeze_observers=0.25, freeze_batch_norm=0.5, fold=0.75, activations=4
)


def trained(mode, backend=None):
    task = make_task(8, SCHEDULE)
    if mode == "step" and backend is not None:
        task.compute = torch.compile(task.model.forward, dynamic=False, backend=backend)
    else:
        task.compute = training_forward(task.model, mode)
    milestones = [Calibrate(2), CalibrateActivations(2), FreezeObservers(), FreezeBatchNorm()]
    fit(task, *milestones, Fold())
    return task


@pytest.fixture(scope="module")
def eager():
    return trained("off")


def test_every_phase_is_one_graph_and_computes_the_same(eager):
    torch._dynamo.reset()
    counters.clear()
    compiled = trained("step", backend="eager")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 4
    ours, theirs = compiled.model.state_dict(), eager.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("mode", ["off", "regional", "step"])
def test_what_computes_is_not_listed_beside_the_model(mode):
    task = make_task()
    task.compute = training_forward(task.model, mode)
    names = [name for name, _ in task.named_parameters(remove_duplicate=False)]
    assert {name.partition(".")[0] for name in names} == {"model"}


@pytest.mark.slow
def test_fused_kernels_change_the_last_bits_alone(eager):
    compiled = trained("step")
    for name, value in compiled.model.state_dict().items():
        if value.is_floating_point():  # 8 bits leave a few codes that turn at ties
            torch.testing.assert_close(value, eager.model.state_dict()[name], rtol=0.05, atol=0.02)


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="compile=regional or compile=step, got 'all'"):
        training_forward(torch.nn.Linear(1, 1), "all")  # pyright: ignore[reportArgumentType]
