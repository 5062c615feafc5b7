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
from tests.training.small import EPOCHS, fit, make_task, same

SCHEDULE = Schedule(
    1, EPOCHS - 1, freeze_observers=0.25, freeze_batch_norm=0.5, fold=0.75, activations=4
)


def trained(mode, backend=None, checkpointing="off", **values):
    task = make_task(8, SCHEDULE)
    if mode == "step" and backend is not None:
        task.compute = torch.compile(task.model.forward, dynamic=False, backend=backend)
    else:
        task.compute = training_forward(task.model, mode, checkpointing)
    milestones = [Calibrate(2), CalibrateActivations(2), FreezeObservers(), FreezeBatchNorm()]
    fit(task, *milestones, Fold(), **values)
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


@pytest.mark.parametrize("count", ["auto", 9])
def test_a_run_that_computes_segments_again_is_the_same_run(count, eager):
    again = trained("off", checkpointing=count)
    assert same(again.model, eager.model)


def test_gradients_of_several_batches_add_up_to_the_same():
    plain, again = (trained("off", None, c, accumulate_grad_batches=2) for c in ("off", 9))
    assert same(again.model, plain.model)


@pytest.mark.parametrize("value", [1, 0, True, False, "on", 2.5, None])
def test_another_number_of_segments_is_refused(value):
    with pytest.raises(ConfigError, match=f"checkpointing=off, .* got {value!r}: correct it"):
        training_forward(torch.nn.Linear(1, 1), "off", value)


def test_a_compiled_step_chooses_for_itself_what_it_computes_again():
    with pytest.raises(ConfigError, match=r"checkpointing=off with compile=step.* set compile=reg"):
        training_forward(torch.nn.Linear(1, 1), "step", "auto")


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="compile=regional or compile=step, got 'all'"):
        training_forward(torch.nn.Linear(1, 1), "all")  # pyright: ignore[reportArgumentType]
