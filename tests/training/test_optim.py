import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from qat.assemble import make
from qat.compose import compose_plain
from qat.errors import ConfigError
from qat.fake_quant import activation_quants, scale_parameters
from qat.graph.insert import prepare
from qat.run import hyperparameters
from qat.spec import Rule
from qat.training.optim import Rates, make_optimizer, parameter_groups, rate_factor
from qat.training.schedule import Schedule
from tests.helpers import make_scheme

LEARNED = {"quantizer": "lsq", "observer": "min_max"}


@pytest.fixture
def captured():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    scheme = make_scheme(weight=LEARNED, activation=LEARNED)
    return prepare(model, scheme, torch.randn(2, 3, 8, 8))[0]


def test_groups_hold_every_parameter_exactly_once(captured):
    groups = parameter_groups(captured, Rates())
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in captured.parameters()}


def test_what_decays(captured):
    rates = Rates(lr=0.2, scale_lr_ratio=0.5, weight_decay=0.01)
    groups = {g["name"]: g for g in parameter_groups(captured, rates)}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {
        "weights": 0.01,
        "undecayed": 0.0,
        "scales": 0.0,
    }
    assert {n: g["lr"] for n, g in groups.items()} == {
        "weights": 0.2,
        "undecayed": 0.2,
        "scales": 0.1,
    }
    names = {id(p): n for n, p in captured.named_parameters()}
    assert {names[id(p)] for p in groups["weights"]["params"]} == {"0.weight", "4.weight"}
    assert {names[id(p)] for p in groups["undecayed"]["params"]} == {
        "0.bias", "1.weight", "1.bias", "4.bias",
    }  # fmt: skip
    # one scale per channel has the rank of the weight, and still does not decay
    assert {id(p) for p in groups["scales"]["params"]} == {
        id(p) for p in scale_parameters(captured)
    }
    assert any(p.ndim > 1 for p in groups["scales"]["params"])


@pytest.mark.parametrize(("own", "decay"), [(None, 0.01), (0.3, 0.3), (0.0, 0.0)])
def test_clips_decay_and_other_scales_do_not(own, decay):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    activation = {"quantizer": "pact", "observer": "min_max"}
    scheme = make_scheme(weight=LEARNED, activation=activation)
    captured = prepare(model, scheme, torch.randn(2, 3, 8, 8))[0]
    rates = Rates(scale_lr_ratio=0.5, weight_decay=0.01, clip_decay=own)
    groups = {g["name"]: g for g in parameter_groups(captured, rates)}
    quantizers: list[Any] = [f.quantizer for f in activation_quants(captured)]
    assert len(quantizers) == 2  # the image and the inner ReLU
    assert [id(p) for p in groups["clips"]["params"]] == [id(q.learned_clip) for q in quantizers]
    assert len(groups["scales"]["params"]) == 2
    assert (groups["clips"]["weight_decay"], groups["scales"]["weight_decay"]) == (decay, 0.0)
    assert groups["clips"]["lr"] == groups["scales"]["lr"] == 0.05
    held = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in captured.parameters())


def test_empty_groups_are_left_out():
    groups = parameter_groups(nn.Linear(2, 2, bias=False), Rates())
    assert [g["name"] for g in groups] == ["weights"]


def test_decay_by_bits():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    rules = {
        "ends": Rule("@last", {"bits": 8}),
        "first": Rule("0", {"bits": 3}),
    }
    scheme = make_scheme(2, 8, weight=LEARNED, rules=rules)
    captured = prepare(model, scheme, torch.randn(2, 3, 8, 8))[0]
    rates = Rates(weight_decay=0.01, decay_by_bits={4: 1.0, 3: 0.5, 2: 0.25})
    groups = parameter_groups(captured, rates)
    names = {id(p): n for n, p in captured.named_parameters()}
    shown = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert shown.pop("0.weight") == 0.005
    assert shown.pop("1.weight") == 0.0025
    assert shown.pop("3.weight") == 0.01
    assert set(shown.values()) == {0.0}
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(captured.parameters()))
    assert [g["name"] for g in groups if g["name"].startswith("weights")] == [
        "weights of 3 bits", "weights of 2 bits", "weights",
    ]  # fmt: skip


@pytest.mark.parametrize("factors", [{2: -0.5}, {"two": 0.5}])
def test_factors_that_make_no_sense(factors):
    with pytest.raises(ConfigError, match=r"decay_by_bits .* correct it"):
        Rates(decay_by_bits=factors)


def test_factors_come_through_the_config():
    config = compose_plain(
        ["recipe=resnet_w4a4", "optimizer.rates.decay_by_bits={4: 1.0, 2: 0.25}"]
    )
    assert make(config["optimizer"]["rates"]).decay_by_bits == {4: 1.0, 2: 0.25}
    assert hyperparameters(config)["optimizer.rates.decay_by_bits.2"] == 0.25


RATES = Rates(lr=0.4, qat_lr=0.02, warmup=0.1, end_ratio=0.1)
SCHEDULE = Schedule(float_epochs=4, epochs=6)


def test_rate_at_the_corners():
    factor = partial(rate_factor, total_steps=1000, schedule=SCHEDULE, rates=RATES)
    assert factor(0) == pytest.approx(1 / 40)  # warm-up over 40 of 400 steps, never from 0
    assert factor(39) == factor(40) == 1.0
    assert factor(220) == pytest.approx(0.5)  # middle of the cosine
    assert factor(399) == pytest.approx(0.0, abs=1e-4)
    assert factor(400) == pytest.approx(0.02 / 0.4)
    assert factor(700) == pytest.approx(0.02 / 0.4 * 0.55)
    assert factor(1000) == pytest.approx(0.02 / 0.4 * 0.1)


def test_rate_jumps_only_where_quantization_starts():
    values = [rate_factor(s, 1000, SCHEDULE, RATES) for s in range(1001)]
    jumps = [s for s in range(1, 1001) if abs(values[s] - values[s - 1]) > 0.03]
    assert jumps == [400]
    assert all(v >= 0 for v in values)
    assert all(a >= b for a, b in pairwise(values[400:]))


def test_rate_without_a_float_part():
    schedule = Schedule(float_epochs=0, epochs=3)
    rates = Rates(lr=0.1, qat_lr=0.1)
    assert rate_factor(0, 10, schedule, rates) == 1.0
    for step in range(11):
        expected = 0.5 * (1 + math.cos(math.pi * step / 10))
        assert rate_factor(step, 10, schedule, rates) == pytest.approx(expected)
    assert rate_factor(12, 10, schedule, rates) == pytest.approx(0.0)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_very_short_runs(total):
    schedule = Schedule(float_epochs=1, epochs=1)
    assert all(0 <= rate_factor(s, total, schedule, Rates()) <= 1 for s in range(total + 1))


def test_optimizer_follows_the_schedule(captured):
    factory = partial(torch.optim.SGD, lr=123.0, momentum=0.9)
    rates = Rates(lr=0.4, qat_lr=0.02, scale_lr_ratio=0.1)
    optimizer, scheduler = make_optimizer(captured, factory, lambda: rates, SCHEDULE, 1000)
    rate_of = {g["name"]: g for g in optimizer.param_groups}
    for step in range(500):
        expected = rate_factor(step, 1000, SCHEDULE, rates) * 0.4
        assert rate_of["weights"]["lr"] == pytest.approx(expected)
        assert rate_of["scales"]["lr"] == pytest.approx(expected * 0.1)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"qat_lr": -1.0},
        {"scale_lr_ratio": -0.1},
        {"lr": "fast"},
        {"lr": "up to 0.1"},
        {"qat_lr": "upto 0.1"},
        {"qat_lr": "up to -0.1"},
        {"qat_lr": "up to nan"},
        {"qat_lr": "up to here"},
        {"qat_lr": math.nan},
        {"warmup": 2.0},
        {"restart": 1},
    ],
)
def test_rates_that_make_no_sense(values):
    ((key, value),) = values.items()
    with pytest.raises(ConfigError, match=rf"optimizer\.rates\.{key} to be .* got {value!r}"):
        Rates(**values)
