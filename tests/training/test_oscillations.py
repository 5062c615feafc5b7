import math
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from qat.assemble import make as build
from qat.compose import compose_plain
from qat.errors import ConfigError
from qat.layers import quantized_layers
from qat.quantizers import LSQ
from qat.spec import QuantSpec
from qat.training.callbacks import (
    Calibrate,
    Dampen,
    Fold,
    FreezeBatchNorm,
    FreezeObservers,
    FreezeOscillations,
    Prune,
    TrackOscillations,
)
from qat.training.callbacks.oscillations import quantized_progress
from qat.training.oscillations import (
    Oscillations,
    can_hold,
    cosine,
    dampening,
    dampening_loss,
    hold_codes,
    weight_codes,
)
from qat.training.schedule import Schedule
from tests.helpers import calibrate
from tests.training.small import Data, Save, fit, make_task, same


def by_hand(sequence, momentum):
    """The paper's recursions for one weight: frequency and average after every step."""
    last, sign, frequency, average = sequence[0], 0, 0.0, float(sequence[0])
    seen = []
    for code in sequence[1:]:
        oscillates = code != last and sign != 0 and (code > last) != (sign > 0)
        frequency = momentum * oscillates + (1 - momentum) * frequency
        average = momentum * code + (1 - momentum) * average
        if code != last:
            sign = 1 if code > last else -1
        last = code
        seen.append((frequency, average))
    return seen


def test_frequency_and_average_follow_the_recursions():
    codes = torch.randint(-2, 3, (12, 40)).float()
    history = Oscillations(codes[0], 0.5)  # powers of two are exact
    expected = [by_hand(codes[:, i].tolist(), 0.5) for i in range(40)]
    for step in range(11):
        history.update(codes[step + 1])
        assert history.frequency.tolist() == [e[step][0] for e in expected]
        assert history.average.tolist() == [e[step][1] for e in expected]


def test_a_walk_in_one_direction_and_a_pause_are_no_oscillation():
    history = Oscillations(torch.zeros(2), 1.0)
    turns = []
    for codes in ([1, 1], [2, 1], [2, 1], [3, 0], [3, 0], [4, 1]):
        history.update(torch.tensor(codes).float())
        turns.append(history.frequency.tolist())
    assert turns == [[0, 0], [0, 0], [0, 0], [0, 1], [0, 0], [0, 1]]


def test_what_is_above_the_threshold_freezes_at_its_rounded_average():
    history = Oscillations(torch.zeros(3), 0.5)
    for codes in ([2, 1, 1], [0, 0, 1], [2, 1, 1]):
        history.update(torch.tensor(codes).float())
    assert history.frequency.tolist() == [0.75, 0.75, 0.0]
    assert history.average.tolist() == [1.25, 0.625, 0.875]
    history.freeze(0.75)
    assert not history.frozen.any()  # above, not at
    history.freeze(0.7)
    assert history.frozen.tolist() == [True, True, False]
    assert history.codes.tolist() == [1, 1, 1]
    history.update(torch.tensor([-5.0, -5.0, -5.0]))
    assert history.codes.tolist() == [1, 1, -5]
    assert history.frequency.tolist() == [0.75, 0.75, 0.5]
    history.update(torch.tensor([-5.0, -5.0, 5.0]))
    assert history.share == pytest.approx(1 / 3)


def test_a_history_comes_back_from_its_state():
    history = Oscillations(torch.zeros(8), 0.3)
    for _ in range(5):
        history.update(torch.randint(-2, 3, (8,)).float())
    history.freeze(0.2)
    twin = Oscillations(torch.zeros(8), 0.3)
    twin.load(history.state())
    codes = torch.randint(-2, 3, (8,)).float()
    for each in (history, twin):
        each.update(codes)
    assert all(torch.equal(history.state()[n], twin.state()[n]) for n in Oscillations.NAMES)


@pytest.mark.parametrize("scale", [0.5, [[0.5], [0.25]]], ids=["tensor", "channel"])
def test_dampening_is_the_squared_distance_from_centres_inside_the_grid(scale):
    spec = QuantSpec(3, axis=0 if isinstance(scale, list) else None, narrow=True)
    quantizer = LSQ(spec, tuple(torch.tensor(scale).shape), has_batch=False)
    quantizer.set_scale(torch.tensor(scale))
    step = torch.tensor(scale).expand(2, 1)
    v = torch.tensor([[-3.6, -3.0, -2.3, 0.2, 0.5, 1.5, 2.9, 3.0, 3.2]])
    weight = (v * step).requires_grad_()
    loss = dampening_loss(weight, quantizer)
    loss.backward()
    nearest = torch.tensor([[-3, -3, -2, 0, 0, 2, 3, 3, 3]])  # ties to even
    inside = (v >= -3) & (v <= 3)
    distance = (weight.detach() - nearest * step) * inside
    assert loss.item() == pytest.approx(distance.square().sum().item())
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * distance)
    assert quantizer.learned_scale.grad is None


def test_cosine_corners():
    assert [cosine(0.1, 0.01, p) for p in (-1.0, 0.0, 1.0, 2.0)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01]
    )
    assert cosine(0.0, 1.0, 0.25) == pytest.approx(0.5 * (1 - math.cos(math.pi / 4)))


def first(task):
    return next(layer for _, layer in quantized_layers(task.model))


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
def test_held_codes_survive_a_scale_that_moves(batch_norm):
    task = make_task(2, batch_norm=batch_norm)
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    layer = first(task)
    codes, where = weight_codes(layer), torch.rand(layer.raw_weight.shape) < 0.5
    assert can_hold(layer)
    before = layer.raw_weight.detach().clone()
    layer.weight_quant.quantizer.set_scale(layer.weight_quant.quantizer.scale * 3.7)
    assert not torch.equal(weight_codes(layer)[where], codes[where])
    hold_codes(layer, codes, where)
    assert torch.equal(weight_codes(layer)[where], codes[where])
    assert torch.equal(layer.raw_weight[~where], before[~where])


class Watch(pl.Callback):
    """Note after every step which codes are frozen, and that weights have them."""

    def __init__(self, freeze):
        self.freeze, self.frozen = freeze, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layer = first(pl_module)
        history = self.freeze.found["0"]
        mask = layer._buffers.get("weight_mask")
        where = history.frozen if mask is None else history.frozen & (mask > 0)
        assert torch.equal(weight_codes(layer)[where], history.codes[where])
        self.frozen.append((history.frozen.clone(), history.codes.clone()))


def eager():
    return FreezeOscillations(start=0.15, end=0.05, momentum=0.2)


END = (FreezeObservers, FreezeBatchNorm, Fold)


@pytest.mark.parametrize("prune", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("batch_norm", ["late", "folded"])
def test_a_frozen_weight_keeps_its_code_to_the_end(batch_norm, prune):
    task, freeze = make_task(2, batch_norm=batch_norm), eager()
    watch = Watch(freeze)
    masks = [Prune(0.3, end=0.6, every_n_steps=3)] if prune else []
    fit(task, *masks, Calibrate(2), *[end() for end in END], freeze, watch)
    for (frozen, codes), (later, after) in zip(watch.frozen, watch.frozen[1:], strict=False):
        assert not (frozen & ~later).any()
        assert torch.equal(codes[frozen], after[frozen])
    assert 0 < watch.frozen[-1][0].double().mean() < 1
    assert watch.frozen[0][0].sum() == 0


def test_tracking_changes_nothing_and_sees_oscillations():
    plain, tracked, track = make_task(2), make_task(2), TrackOscillations(0.2)
    fit(plain, Calibrate(2))
    fit(tracked, Calibrate(2), track)
    assert same(plain.model, tracked.model)
    assert set(track.shares) == {"0", "4"}
    assert 0 < track.shares["0"] < 1


@pytest.mark.parametrize("make", [eager, lambda: Dampen(1.0)], ids=["freeze", "dampen"])
def test_a_resumed_run_ends_like_one_that_was_not_cut(make, tmp_path):
    whole, resumed, plain = make_task(2), make_task(2), make_task(2)
    fit(plain, Calibrate(2), *[end() for end in END])
    first_run, second = make(), make()
    fit(whole, Calibrate(2), *[end() for end in END], first_run, Save(tmp_path / "cut.ckpt"))
    path = tmp_path / "cut.ckpt"
    fit(resumed, Calibrate(2), *[end() for end in END], second, resume=path)
    assert same(whole.model, resumed.model)
    assert not same(whole.model, plain.model)
    if isinstance(second, FreezeOscillations):
        assert all(
            torch.equal(a, second.found[name].state()[key])
            for name, history in first_run.found.items()  # pyright: ignore[reportAttributeAccessIssue]
            for key, a in history.state().items()
        )


def test_thresholds_and_weights_move_behind_calibration():
    schedule = Schedule(float_epochs=1, epochs=4, calibrate=0.25)  # of 100 steps: from 40 on
    steps = (0, 39, 40, 55, 100, 110)
    seen = [quantized_progress(step, 100, schedule) for step in steps]
    assert seen == [0.0, 0.0, 0.0, 0.25, 1.0, 1.0]
    end = Schedule(float_epochs=1, epochs=0)
    assert [quantized_progress(step, 10, end) for step in (9, 10)] == [0.0, 0.0]

    task, dampen = make_task(2, schedule), Dampen(0.5, 0.1)
    task.total_steps = 100
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    for step, weight in ((0, 0.1), (70, 0.3), (100, 0.5)):  # the middle of the cosine is its mean
        trainer: Any = SimpleNamespace(global_step=step)
        dampen.on_train_batch_start(trainer, task, None, 0)
        expected = weight * dampening(task.model).item()
        assert task.penalties["dampen"]().item() == pytest.approx(expected) != 0.0


def test_steps_are_counted_where_gradients_accumulate():
    seen = []

    class Count(TrackOscillations):
        def follow(self, name, layer, progress):
            seen.append((name, progress))

    fit(make_task(2), Calibrate(2), Count(), accumulate_grad_batches=2)
    assert [p for n, p in seen if n == "0"] == pytest.approx([(s + 1) / 20 for s in range(20)])


def test_dampening_brings_weights_to_their_centres():
    ends = []
    for dampen in ([], [Dampen(10.0)]):
        task = make_task(2)
        fit(task, Calibrate(2), FreezeObservers(), *dampen)
        ends.append(dampening(task.model).item())
    assert ends[1] < ends[0] / 2


def test_dampening_counts_quantized_weights_only():
    task = make_task(2)
    assert dampening(task.model).item() == 0.0
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    total = sum(
        dampening_loss(layer.raw_weight, layer.weight_quant.quantizer).item()
        for _, layer in quantized_layers(task.model)
    )
    assert dampening(task.model).item() == pytest.approx(total)


def test_a_quantizer_that_moves_weights_is_left_out(monkeypatch):
    task, freeze = make_task(4), eager()
    monkeypatch.setattr(LSQ, "codes", lambda self, x: (x.tanh() / x.tanh().abs().max() * 7).round())
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    assert not can_hold(first(task))
    fit(task, Calibrate(2), freeze)
    assert not freeze.found["0"].frozen.any()
    assert freeze.found["4"].frozen.any()  # small weights, where tanh moves nothing


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrackOscillations(0.0),
        lambda: FreezeOscillations(0.01, 0.1),
        lambda: Dampen(-1.0),
    ],
)
def test_values_that_make_no_sense(make):
    with pytest.raises(ConfigError, match=r"expected .*oscillations\..* correct"):
        make()


@pytest.mark.parametrize("word", ["track", "freeze", "dampen"])
def test_words_of_the_group(word):
    config = compose_plain(["recipe=resnet_w4a4", f"oscillations={word}"])
    assert isinstance(build(config["callbacks"]["oscillations"]), pl.Callback)
    assert not compose_plain(["recipe=resnet_w4a4"])["callbacks"]["oscillations"]
