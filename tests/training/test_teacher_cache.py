"""A cache says what the teacher says, bit for bit; what it cannot know is an error."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from qat.data import DigitsData
from qat.errors import ConfigError
from qat.training.callbacks import (
    Calibrate,
    CalibrateActivations,
    Distill,
    Fold,
    FreezeBatchNorm,
    FreezeObservers,
)
from qat.training.distill import Teacher
from qat.training.evaluate import first_output
from qat.training.schedule import Schedule
from qat.training.teacher_cache import TeacherCache, odd_factors, sample_keys
from tests.training import small

SCHEDULE = Schedule(1, small.EPOCHS - 1, 0.0, freeze_observers=0.1, freeze_batch_norm=0.1, fold=0.2)
LATER = replace(SCHEDULE, freeze_observers=0.9, freeze_batch_norm=0.9, fold=0.9)


def images() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    return nn.Sequential(*layers).eval()


def sequences() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 8), nn.Tanh(), nn.Linear(8, 50)).eval()


def known(teacher: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return first_output(teacher(x))


@pytest.fixture(scope="module")
def digits() -> DigitsData:
    return DigitsData(augment="none", batch_size=32)


def test_logits_are_the_teachers_bit_for_bit(digits):
    teacher = images()
    cache = TeacherCache(teacher, digits.training_inputs())
    for x in digits.training_inputs():
        assert torch.equal(cache(x), known(teacher, x))
    assert cache.misses == 0


def test_training_finds_every_sample_in_any_order_and_memory_format(digits):
    teacher = images()
    cache = TeacherCache(teacher, digits.training_inputs())
    for x, _ in digits.train_dataloader():
        for same in (x, x.to(memory_format=torch.channels_last), x.repeat(2, 1, 1, 1)[32:]):
            # Rows stand elsewhere in their batch, where sums of floats may round otherwise.
            torch.testing.assert_close(cache(same), known(teacher, x), rtol=1e-5, atol=1e-6)
    assert cache.misses == 0


def test_sequences_of_tokens_have_a_row_for_each_position():
    x, teacher = torch.randint(50, (24, 7)), sequences()
    cache = TeacherCache(teacher, x.split(8))
    assert torch.equal(cache(x[8:16]), known(teacher, x[8:16]))
    assert cache(x).shape == (24 * 7, 50)
    assert cache.misses == 0


class Counting(nn.Linear):
    """Says how often it was called."""

    calls = 0

    def forward(self, input):
        self.calls += 1
        return super().forward(input) * 0 + self.calls


def test_samples_that_do_not_differ_share_the_logits_of_the_first():
    x = torch.randn(24, 6)
    cache = TeacherCache(Counting(6, 3), [x[:8], x[8:16], x[:16].flip(0), x[16:]])
    calls = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(8)
    assert torch.equal(cache(x), calls[:, None].expand(24, 3))
    assert cache.misses == 0


def test_one_bit_makes_another_sample():
    x = torch.randn(16, 6)
    cache = TeacherCache(nn.Linear(6, 3), [x])
    other = x.clone()
    other[:, 3] = torch.nextafter(x[:, 3], torch.tensor(torch.inf))
    cache(torch.cat([x[:4], other]))
    assert cache.misses == 16


@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.0, 1.0, 2.0**20, -1.0)], ids=["black", "round"])
def test_keys_tell_round_numbers_apart(levels):
    x = torch.tensor(levels)[torch.randint(len(levels), (20_000, 49))].unique(dim=0)
    keys = sample_keys(x, odd_factors(x[0]))
    assert len(keys.unique()) == len(x)
    assert torch.equal(sample_keys(x[7:8], odd_factors(x[7])), keys[7:8])


def trained(schedule=SCHEDULE, cached=True, resume=None, save=None) -> Any:
    task = small.make_task(4, schedule)
    milestones = [Distill(cache=cached), Calibrate(2), CalibrateActivations(2)]
    milestones += [FreezeObservers(), FreezeBatchNorm(), Fold()]
    small.fit(task, *milestones, *([small.Save(save)] if save else []), resume=resume)
    return task


@pytest.fixture(scope="module")
def whole():
    return trained()


def test_a_run_learns_the_same_from_a_cache(whole):
    """Exactly: training goes through the same batches of the same size as the cache did."""
    live = trained(cached=False)
    assert small.same(whole.model, live.model)
    assert isinstance(whole.teacher.model, TeacherCache)
    assert not isinstance(live.teacher.model, TeacherCache)


@pytest.mark.parametrize("schedule", [SCHEDULE, LATER], ids=["folded", "quantized"])
def test_a_resumed_run_is_the_same_run(schedule, tmp_path):
    first = trained(schedule, save=tmp_path / "cut.ckpt")
    resumed = trained(schedule, resume=tmp_path / "cut.ckpt")
    assert small.same(first.model, resumed.model)
    for name in ("_keys", "_rows", "_logits"):
        assert torch.equal(getattr(first.teacher.model, name), getattr(resumed.teacher.model, name))


def test_checkpoints_hold_the_teacher_and_no_logits(tmp_path):
    trained(save=tmp_path / "cut.ckpt")
    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)["callbacks"]["Distill"]
    assert state.keys() == {"done", "teacher"}


def test_the_network_is_let_go_of():
    teacher = nn.Linear(6, 3)
    cache, reference = TeacherCache(teacher, [torch.randn(4, 6)]), weakref.ref(teacher)
    del teacher
    gc.collect()
    assert cache.misses == 0
    assert reference() is None


def test_looking_up_is_one_graph_and_asks_the_device_nothing():
    """A full graph has no place for a number that Python waits for."""
    torch._dynamo.reset()
    x, student, loss = torch.randn(8, 6), torch.randn(8, 3), torch.tensor(2.0)
    cache = TeacherCache(nn.Linear(6, 3), [x])
    teacher = Teacher(cache, 0.5, 1.0)
    mix = torch.compile(teacher.mix, fullgraph=True, backend="eager")
    assert torch.equal(mix(loss, student, x), teacher.mix(loss, student, x))
    mix(loss, student, x + 1)
    assert cache.misses == 8


def test_compiled_steps_do_not_break_at_it_and_learn_the_same():
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (small.make_task(4, Schedule(0, 1)) for _ in range(2))
    compiled.compute = torch.compile(compiled.model.forward, dynamic=False, backend="eager")
    for task in (eager, compiled):
        small.fit(task, Distill(cache=True), Calibrate(2), epochs=1)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"]
    assert small.same(compiled.model, eager.model)


class Noisy(small.Data):
    """Says that its samples stay what they are, and changes two of them in each epoch."""

    def train_dataloader(self):
        x = self.x.clone()
        x[[3, 40]] += 1.0
        return DataLoader(TensorDataset(x, self.y), 8)


@pytest.mark.parametrize("limit", [1.0, 0], ids=["validated", "not validated"])
def test_unknown_samples_end_the_run_in_front_of_validation(limit):
    data = Noisy()
    task = small.make_task(4, Schedule(0, small.EPOCHS))
    seen = []
    task.on_validation_epoch_end = lambda: seen.append(task.current_epoch)
    message = "same in every epoch .* got 2 in this one .* switch off .* or set"
    with pytest.raises(ConfigError, match=message):
        small.fit(task, Distill(cache=True), Calibrate(2), data=data, limit_val_batches=limit)
    assert seen == []
    assert task.current_epoch == 0


class Random(small.Data):
    is_random = True


def test_augmentation_is_refused_before_training_starts():
    task = small.make_task(4, SCHEDULE)
    with pytest.raises(ConfigError, match=r"got ones that are augmented.* data\.augment=none"):
        small.fit(task, Distill(cache=True), Calibrate(2), data=Random())
    assert task.global_step == 0
    nothing_to_teach = small.make_task(4, Schedule(1, 0))
    small.fit(nothing_to_teach, Distill(cache=True), Calibrate(2), data=Random(), epochs=1)


def test_features_are_not_kept():
    with pytest.raises(ConfigError, match=r"cache=true, got '1\|4': logits alone are kept"):
        Distill(features="1|4", cache=True)
