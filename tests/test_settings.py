"""The check of a composed config: unknown keys, and values that are not of their kind."""

import math
from copy import deepcopy
from typing import Any

import pytest
from torch import nn

from qat.assemble import make_schedule
from qat.compose import compose_plain
from qat.errors import ConfigError, QatError
from qat.settings.check import check
from qat.settings.signature import kind_of
from qat.trainer import make_trainer


class Untyped(nn.Module):
    """A model whose parameters have defaults and no annotations."""

    def __init__(self, num_classes=3, act="ReLU"):
        super().__init__()


BASE = ["recipe=tabular_w8a8", "distillation=logits", "pruning=magnitude", "optimizer=sam"]


@pytest.fixture(scope="module")
def config():
    return compose_plain(BASE)


def changed(config, key, value):
    """A copy with another value at a dotted key, which may be a new one."""
    copy = deepcopy(config)
    *groups, last = key.split(".")
    node = copy
    for group in groups:
        node = node[group]
    node[last] = deepcopy(value)
    return copy


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.lr", 3, ["No key optimizer.lr. Did you mean optimizer.rates.lr?"]),
        ("optimizer.nope", 3, ["No key optimizer.nope"]),
        ("sed", 3, ["No key sed. Did you mean seed?"]),
        ("data.batchsize", 3, ["No key data.batchsize. Did you mean data.batch_size?"]),
        ("data.seed", 3, ["No key data.seed: seed sets it"]),
        ("trainer.logger", False, ["No key trainer.logger: logger sets it"]),
        ("optimizer.factory.base.lr", 1.0, ["factory.base.lr: optimizer.rates.lr sets it"]),
        ("callbacks.fold.speed", 1, ["No key callbacks.fold.speed"]),
        ("scheme.rules.body.weights", {}, ["rules.body.weights. Did you mean", "body.weight"]),
        (
            "scheme.rules.mine",
            {"match": "linear", "weight": 4},
            ["mine.weight", "such as {bits: 4} or float or null, got 4"],
        ),
        ("scheme.rules.body.weight.bits", "abc", ["rules.body.weight.bits", "1 to 16", "'abc'"]),
        ("scheme.rules.body.weight.quantizer", "lqs", ["body.weight.quantizer", "mean lsq"]),
        ("scheme.rules.body.weight.quantizer", {"name": "lsq", "x": 1}, ["weight.quantizer.x"]),
        ("scheme.rules", None, ["scheme.rules", "got null"]),
        ("seed", -1, ["seed", "from 0 to 4294967295", "got -1"]),
        ("callbacks.calibrate.num_batches", 10**20, ["whole numbers end at 92233720368547"]),
        ("seed", True, ["seed", "got true"]),
        ("seed", 2**64, ["seed", "4294967295"]),
        ("name", "../x", ["name", "without slashes"]),
        ("name", "a\nb", ["name", r"'a\nb'"]),
        ("name", "x" * 300, ["name", "folder's name"]),
        ("output_dir", None, ["output_dir", "got null"]),
        ("ckpt_key", "", ["ckpt_key", "a word or null"]),
        ("ckpt_new_head", "yes", ["ckpt_new_head", "true or false"]),
        ("ckpt", 5, ["ckpt to be a path or null, got 5"]),
        ("pruning.ratio", -1, ["pruning.ratio", "at least 0 and below 1", "got -1"]),
        ("optimizer.label_smoothing", math.nan, ["optimizer.label_smoothing", "finite"]),
        ("optimizer.factory", None, ["optimizer.factory", "got null"]),
        ("optimizer.factory._partial_", 3, ["optimizer.factory._partial_", "true or false"]),
        ("optimizer.factory._target_", "torch.nn.Linear", ["factory._target_", "a Optimizer"]),
        ("data.val_fraction", math.inf, ["data.val_fraction", "finite", "inf"]),
        ("data.batch_size", 0.5, ["data.batch_size", "whole number", "0.5"]),
        ("trainer.precision", "16-true", ["trainer.precision", "16-mixed", "'16-true'"]),
        ("trainer.limit_val_batches", 0, ["limit_val_batches", "quantized accuracy"]),
        ("trainer.devices", "abc", ["trainer.devices", "'abc'"]),
        ("trainer.max_epochs", {"_target_": "builtins.int"}, ["trainer.max_epochs", "whole"]),
        ("trainer.fast_dev_run", True, ["trainer.fast_dev_run", "no checkpoint", "got true"]),
        ("trainer.strategy", "dpp", ["trainer.strategy", "did you mean ddp"]),
        ("callbacks.best.monitor", "nope", ["callbacks.best.monitor", "val/quantized_accuracy"]),
        ("callbacks.mine", {"_target_": "math.pi"}, ["callbacks.mine._target_", "float"]),
        ("callbacks.mine", {"_target_": "math.pie"}, ["No 'pie' in math"]),
        ("callbacks.mine", {"_target_": "nosuch.X"}, ["No module named 'nosuch'", "installed"]),
        ("callbacks.mine", {"_target_": "torch.nn.Linear"}, ["mine._target_ to be a Callback"]),
        ("callbacks.mine", 5, ["callbacks.mine", "got 5"]),
        ("model._target_", "torch.optim.SGD", ["model._target_ to be a Module"]),
        ("model.name", "lineer", ["model.name", "did you mean linear"]),
        ("export", {}, ["expected a value for export.storage"]),
    ],
)
def test_mistake_is_named(key, value, words, config):
    with pytest.raises(ConfigError) as caught:
        check(changed(config, key, value))
    sentence = str(caught.value)
    assert [word for word in words if word not in sentence] == [], sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=3", "No key optimizer.lr. Did you mean optimizer.rates.lr?"),
        ("~nosuch", "No key nosuch"),
        ("+seed=3", "got +seed, which exists"),
        ("seed=1,2", "--multirun"),
        ("seed=[1", "'seed=[1'"),
        ("=3", "write its key"),
        ("model=null", "name of a model"),
        ("optimizer=5", "name of a optimizer"),
        ("name=${nosuch}", "expected name to refer to what exists"),
        ("name=${name}", "expected name to refer to what exists"),
        ("~optimizer.rates", "expected a value for optimizer.rates"),
    ],
)
def test_override_that_cannot_be_used(override, words):
    with pytest.raises(ConfigError) as caught:
        compose_plain(["recipe=tabular_w8a8", override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_documented_passes(config):
    for key, value in (
        ("callbacks.best", None),
        ("trainer.devices", -1),
        ("trainer.limit_train_batches", 0.5),
        ("schedule.bits", {8: 0.0, 4: 3}),
        ("scheme.rules.mine", {"match": "linear", "weight": "float"}),
        ("model", {"name": "custom", "_target_": "tests.test_settings.Untyped", "act": "GELU"}),
        ("scheme.rules.body.weight.quantizer", {"name": "lsq", "rounding": "stochastic"}),
    ):
        check(changed(config, key, value))


def test_a_value_of_the_users_own_may_be_referred_to():
    with pytest.raises(ConfigError, match="No key my_rate"):
        compose_plain([*BASE, "+my_rate=0.25"])
    values = compose_plain([*BASE, "+my_rate=0.25", "optimizer.rates.lr=${my_rate}"])
    assert values["optimizer"]["rates"]["lr"] == 0.25


def test_a_checkpoint_replaces_the_float_epochs_unless_its_head_is_new():
    given = ["recipe=tabular_w8a8", "schedule.float_epochs=3", "schedule.epochs=2"]
    values = compose_plain(given)
    assert make_schedule(values).float_epochs == 3
    assert make_schedule({**values, "ckpt": "a.pt"}).float_epochs == 0
    anew = {**values, "ckpt": "a.pt", "ckpt_new_head": True}
    assert make_schedule(anew).float_epochs == 3


def test_an_optimizer_that_cannot_be_made_is_refused_before_training(config):
    values = changed(config, "optimizer.factory.base.momentum", -1.0)
    check(values)
    with pytest.raises(QatError, match=r"optimizer\.factory .*Invalid momentum"):
        make_trainer(values, make_schedule(values))


def test_a_resume_needs_a_checkpoint(config, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(QatError, match=r"ckpt_path .*last\.ckpt.* empty"):
        check(changed(config, "ckpt_path", str(tmp_path / "last.ckpt")))


def test_an_argument_without_annotation_takes_anything():
    assert all(kind_of(Any, default).fits(value) for default in (3, None) for value in (4, "text"))
