"""Rates that are chosen by trying them: which one is taken, and what the run knows of it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qat.compose import compose_plain
from qat.errors import ConfigError
from qat.training.callbacks import (
    Calibrate,
    CalibrateActivations,
    Fold,
    FreezeBatchNorm,
    FreezeObservers,
    LowerBits,
    ProbeRate,
)
from qat.training.callbacks.miniature import Miniature
from qat.training.callbacks.probe import choose, descend, lower_rates
from qat.training.distill import Teacher
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from tests.helpers import calibrate
from tests.training.small import Data, Save, fit, make_task, same

PROBED = Rates(0.05, "up to 0.5")


@pytest.mark.parametrize(
    ("losses", "tried", "chosen"),
    [
        ([1.0, 1.2, 0.5], 2, 0),  # the highest gains most: none below is asked for
        ([1.0, 1.05, 1.09, 1.2], 4, 2),  # lower ones that gain nearly as much are safer
        ([1.0, 1.05, 0.5, 1.0], 4, 2),
        ([3.0, 1.0, 1.5], 3, 1),
        ([math.inf, math.inf, 1.0, 1.9], 4, 2),
        ([2.2, 2.3, 2.1, 1.0, 1.2], 5, 3),  # none of the first gains over 2.0 without a step
        ([2.2, 2.3, 2.4], 3, 2),  # nor does any: the lowest
        ([1.9, 1.95, 1.2, 1.5], 4, 2),  # one by chance, which does not end it
        ([1.9, 1.95, 1.96, 1.2], 3, 0),  # but two in a row do
        ([2.5, 1.9, 2.0, 1.89, 1.95, 1.9, 1.99, 1.99], 8, 5),
    ],
)
def test_the_lowest_rate_that_gains_nearly_as_much_as_the_best(losses, tried, chosen):
    found = {1.0 / 2**i: loss for i, loss in enumerate(losses)}
    probe = ProbeRate()
    assert probe.chosen is None
    probe.untrained = 2.0
    probe.tried = descend(found, found.__getitem__, untrained=2.0)
    assert [*probe.tried] == [*found][:tried]
    assert probe.chosen == [*found][chosen]


def test_rates_go_down_by_four():
    assert lower_rates(0.02)[:4] == [0.02, 0.005, 0.00125, 0.0003125]


class Uncentred(Data):
    """Images like pixels from 0 to 255, whose mean is far from 0."""

    def __init__(self):
        super().__init__()
        self.x = 128 + 32 * self.x


def prepared(data, schedule=None, **rates):
    task = make_task(4, schedule or Schedule(0, 5))
    task.total_steps, task.rates = 40, replace(PROBED, **rates)
    with torch.no_grad():
        task.model.train()(data.x)  # running means near 100
        for _ in range(60):
            task.model(data.x)
    calibrate(task.model, data.x)  # pyright: ignore[reportArgumentType]
    return task


@pytest.mark.parametrize(("frozen_from", "chosen"), [(1.0, 0.05), (0.66, 0.005)])
def test_what_only_live_batch_norms_bear_is_too_high(frozen_from, chosen):
    data = Uncentred()
    task = prepared(data, Schedule(0, 5, freeze_batch_norm=frozen_from, fold=1.0))
    small = Miniature(task, data.labelled_batches(8) * 3, data.labelled_batches(8), None)
    losses = descend([0.05, 0.005, 0.0005], small.loss_of, small.untrained())
    assert choose(losses, small.untrained()) == chosen


def test_a_miniature_leaves_the_run_alone():
    data = Data()
    task = prepared(data)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    small = Miniature(task, data.labelled_batches(6), data.labelled_batches(8)[6:], 0.5)
    first = small.loss_of(0.05)
    assert first == small.loss_of(0.05) != small.loss_of(0.01)
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_without_steps_is_with_steps_of_size_0(share):
    data = Uncentred()
    task = prepared(data, Schedule(0, 5, freeze_batch_norm=share, fold=1.0))
    small = Miniature(task, data.labelled_batches(6), data.labelled_batches(8)[6:], None)
    assert small.untrained() == small.loss_of(1e-45) != small.loss_of(1e-3)


def test_few_batches_are_gone_through_again_and_again():
    data = Uncentred()
    task = prepared(data)
    batches, judges = data.labelled_batches(2), data.labelled_batches(4)[2:]
    few = Miniature(task, batches, judges, None, steps=6)
    assert few.loss_of(0.05) == Miniature(task, batches * 3, judges, None).loss_of(0.05)


class Few(Data):
    """A data set of ``count`` training samples, in batches of at most 8."""

    def __init__(self, count):
        super().__init__()
        self.x, self.y = self.x[:count], self.y[:count]

    def labelled_batches(self, num, *, most=None, augmented=False):
        size = min(most or 8, 8, len(self.x))
        whole = len(self.x) // size * size
        return list(zip(self.x[:whole].split(size), self.y[:whole].split(size), strict=True))[:num]


@pytest.mark.parametrize(
    ("count", "sizes", "judging"),
    [(64, [8] * 6, [8] * 2), (32, [8] * 2, [8] * 2), (24, [8] * 2, [8]), (8, [4], [4])],
)
def test_what_judges_is_not_trained_on(count, sizes, judging):
    seen, judges = ProbeRate(6, 2)._batches(holder(Few(count)), prepared(Uncentred()))
    assert [len(y) for _, y in seen] == sizes
    assert [len(y) for _, y in judges] == judging
    pairs = [(a, b) for x, _ in seen for y, _ in judges for a in x for b in y]
    assert not any(torch.equal(a, b) for a, b in pairs)


def holder(data):
    """Return what stands for a trainer: it has the data."""
    return SimpleNamespace(datamodule=data)


class Counting(nn.Module):
    """A teacher that counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(100, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(("room", "calls"), [(10**6, 4), (2 * 8 * 3 * 4, 2 + 2 * 2), (0, 8)])
def test_a_teacher_that_remembers_says_the_same(room, calls):
    data, model = Data(), Counting()
    teacher = Teacher(model, 0.5, 1.0)
    again, batches = teacher.remembering(room), data.labelled_batches(4)
    logits = torch.randn(8, 3)
    wanted = [teacher.mix(logits.sum(), logits, x) for x, _ in batches] * 2
    model.calls = 0
    assert [again.mix(logits.sum(), logits, x) for x, _ in batches * 2] == wanted
    assert model.calls == calls


def milestones(*more):
    ends = FreezeObservers(), FreezeBatchNorm(), Fold()
    return [LowerBits(2), Calibrate(2), CalibrateActivations(2), *more, *ends]


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(1, 4, activations=0.25, bits={8: 0.0, 4: 0.1}),
        Schedule(0, 5, calibrate=3, freeze_observers=20, freeze_batch_norm=39, fold=40),
    ],
    ids=["late", "steps"],
)
def test_the_run_is_the_one_whose_rate_was_given(schedule, tmp_path):
    probe, path = ProbeRate(6, 2), tmp_path / "saved.ckpt"
    task = make_task(4, schedule)
    task.rates = PROBED
    trainer = fit(task, *milestones(probe, Save(path)))
    assert probe.chosen in lower_rates(0.5)
    assert task.rates.qat_lr == probe.chosen

    given = make_task(4, schedule)
    given.rates = replace(PROBED, qat_lr=probe.chosen)
    other = ProbeRate(6, 2)
    twin = fit(given, *milestones(other))
    assert not other.tried
    assert same(task.model, given.model)
    rates = [[g["lr"] for g in t.optimizers[0].param_groups] for t in (trainer, twin)]
    assert rates[0] == rates[1]

    resumed, again = make_task(4, schedule), ProbeRate(1, 1)
    resumed.rates = PROBED
    fit(resumed, *milestones(again), resume=path)
    assert again.tried == probe.tried
    assert same(task.model, resumed.model)


def test_nothing_is_tried_where_nothing_is_trained():
    probe, task = ProbeRate(), make_task(4, Schedule(0, 0))
    task.rates = PROBED
    fit(task, *milestones(probe), epochs=0)
    assert not probe.tried


@pytest.mark.parametrize("values", [{"num_batches": 0}, {"num_judges": 0}])
def test_a_probe_needs_batches(values):
    with pytest.raises(ConfigError, match=r"callbacks\.probe_rate\.num_\w+ to be"):
        ProbeRate(**values)


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["recipe=resnet_w4a4"], 0.02),
        (["recipe=resnet_w4a4", "ckpt=a.pt"], "up to 0.02"),
        (["recipe=resnet_w4a4", "ckpt=a.pt", "optimizer.rates.qat_lr=0.02"], 0.02),
        (["ckpt=a.pt", "optimizer=adamw"], "up to 0.0002"),
    ],
)
def test_rates_of_recipes_are_probed_with_foreign_weights(words, rate):
    assert compose_plain(words)["optimizer"]["rates"]["qat_lr"] == rate
