"""From a config to what a run trains: data, model and plan; and how it is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from qat.calls import Call
from qat.data import DataModule
from qat.errors import ConfigError, QatError
from qat.export.report import float_bytes
from qat.export.storage import check_storage
from qat.gate import Evaluation
from qat.graph.captured import Captured
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.models import build, load_checkpoint
from qat.outputs import choose_prediction
from qat.spec import Rule, Scheme
from qat.training.callbacks import Prune
from qat.training.schedule import Schedule

Config = Mapping[str, Any]
_EXPORT: Mapping[str, Callable[[Any], object]] = {
    "threshold": lambda value: isinstance(value, int | float) and 0 <= value <= 1,
    "site_samples": lambda value: isinstance(value, int) and value >= 1,
    "samples": lambda value: value is None or (isinstance(value, int) and value >= 1),
    "storage": check_storage,
    "trial": lambda value: isinstance(value, bool),
}


@dataclass(frozen=True)
class Setup:
    """The objects of a run, before training."""

    data: DataModule
    captured: Captured
    plan: Plan
    schedule: Schedule
    float_bytes: int


def make(config: Config, **extra: Any) -> Any:
    """Build the object that a config node names, passing on our own errors as they are.

    Raises:
        ConfigError: If the node's values do not fit what it names.
    """
    try:
        return instantiate(dict(config), _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, QatError):
            raise cause from None
        is_missing = isinstance(cause, ImportError)
        remedy = "install its package" if is_missing else "correct or remove (~group.key) the value"
        raise ConfigError(
            f"expected values that {config.get('_target_')} takes, got {type(cause).__name__} "
            f"({cause}): {remedy}."
        ) from error


def make_one(config: Config, key: str, base: type, **extra: Any) -> Any:
    """Build the object of a config's node ``key``, which has to be a ``base``.

    Raises:
        ConfigError: If it is something else, or the node's values do not fit what it names.
    """
    made = make(config[key], **extra)
    if not isinstance(made, base):
        raise ConfigError(
            f"expected {key}._target_ to give a {base.__name__}, got {type(made).__name__} from "
            f"{config[key].get('_target_')}: correct it."
        )
    return made


def make_scheme(config: Config) -> Scheme:
    """Build the scheme of a config; a rule set to null is left out.

    Raises:
        SpecError: If a rule contradicts itself.
        ConfigError: If a rule has unknown keys.
    """
    try:
        rules = {name: Rule(**rule) for name, rule in config["rules"].items() if rule}
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"expected rules with match, weight and activation, got scheme.rules={config['rules']} "
            f"({error}): correct the key."
        ) from error
    functions = config.get("functions", "float")  # checkpoints of older runs have none
    return Scheme(config["name"], rules, config["batch_norm"], functions)


def make_model(config: Config, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build the float model of a config.

    Args:
        config: The node ``model``.
        num_classes: Classes of the data.
        input_shape: Shape of one sample.

    Raises:
        ConfigError: If the config names something that is not a module.
    """
    values = {k: v for k, v in config.items() if k != "name"}
    if "_target_" in config:
        model = make(values, num_classes=num_classes)
    else:
        if config["name"] == "linear":
            values.setdefault("in_features", math.prod(input_shape))
        if config["name"] == "gpt":
            values.setdefault("context", input_shape[0])
        model = build(config["name"], num_classes, **values)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch module from model, got {type(model).__name__}.")
    return model


def make_schedule(config: Config) -> Schedule:
    """Build the schedule; a checkpoint replaces the float epochs, trainer.max_epochs caps the run.

    A new head has to be trained: with one the float epochs stay.

    Raises:
        ConfigError: If nothing is left for a quantized part that was asked for.
    """
    schedule: Schedule = make_one(config, "schedule", Schedule)
    if config["ckpt"] is not None and not config.get("ckpt_new_head", False):
        schedule = replace(schedule, float_epochs=0)
    total = config["trainer"]["max_epochs"]
    if total is None:
        return schedule
    if schedule.epochs == 0:
        return replace(schedule, float_epochs=min(total, schedule.float_epochs))
    if total <= schedule.float_epochs:
        raise ConfigError(
            f"expected trainer.max_epochs > schedule.float_epochs={schedule.float_epochs}, got "
            f"{total}: nothing would be left to train quantized; raise one or lower the other, or "
            "set schedule.epochs=0 for post-training quantization."
        )
    return replace(schedule, epochs=total - schedule.float_epochs)


def set_up(config: Config) -> Setup:
    """Build data and model, load the float checkpoint, plan and insert.

    Args:
        config: A resolved config, plain values.

    Raises:
        QatError: For every mistake in it, each in one sentence.
    """
    schedule, scheme = make_schedule(config), make_scheme(config["scheme"])
    export_settings(config)  # a mistake there should not wait for the end of training
    prune = Prune(**config["pruning"])
    data: DataModule = make_one(config, "data", DataModule, seed=config["seed"])
    data.setup()
    torch.manual_seed(config["seed"])
    model = make_model(config["model"], data.num_classes, data.input_shape)
    if config["ckpt"] is not None:
        is_new = config.get("ckpt_new_head", False)  # older runs have no such keys
        load_checkpoint(model, config["ckpt"], config.get("ckpt_key"), new_head=is_new)
    example = Call.of(data.calibration_batches(1)[0]).take(2)
    captured, plan = prepare(model, scheme, example)
    wanted = config.get("prediction")  # older runs have none
    chosen = choose_prediction(captured.outputs, wanted, data.num_classes)
    captured.signature.prediction = chosen
    if config["pruning"]["ratio"] > 0:
        prune.add_masks(captured)
    return Setup(data, captured, plan, schedule, float_bytes(model))


def make_evaluation(data: DataModule, config: Config) -> Evaluation:
    """Return the evaluation set, the whole test set, with the gate's and the file's settings.

    Raises:
        ConfigError: If one of the settings makes no sense.
    """
    return Evaluation(data.test_dataloader(), **export_settings(config))


def export_settings(config: Config) -> dict[str, Any]:
    """Return fields of ``Evaluation`` from the node ``export``; older runs may lack some.

    Raises:
        ConfigError: If a value makes no sense.
    """
    export: dict[str, Any] = dict(config["export"])
    for key, value in export.items():
        if key not in _EXPORT or not _EXPORT[key](value):
            raise ConfigError(
                "expected export.threshold from 0 to 1, whole export.samples and "
                "export.site_samples of at least 1, export.storage and export.trial=true or false, "
                f"got export.{key}={value!r}: correct or remove it."
            )
    return {key: value for key, value in export.items() if key != "trial"}


def describe(data: DataModule, config: Config) -> dict[str, Any]:
    """Return the facts that travel inside the exported files."""
    schedule = make_schedule(config)
    return {
        "name": config["name"],
        "seed": config["seed"],
        "epochs": f"{schedule.float_epochs} + {schedule.epochs}",
        "classes": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "input_shape": data.input_shape,
    }
