"""One run: config, objects, training, artifact. The only library module that sees a config."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from qat.artifact import Baseline, Evaluation, write_artifact
from qat.batch_norm import batch_norms
from qat.data import DataModule
from qat.errors import CheckpointError, ConfigError, QatError, TrainingError
from qat.export.report import Report, float_bytes
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.graph.table import plan_table
from qat.graph.trace import Captured
from qat.models import build, load_checkpoint
from qat.spec import Rule, Scheme
from qat.training.callbacks import Calibrate, Clock, Prune
from qat.training.schedule import Schedule
from qat.training.task import QATTask

log = logging.getLogger("qat")
Config = Mapping[str, Any]
HYPERPARAMETERS = ("optimizer", "schedule", "scheme", "pruning", "model", "data", "seed", "ckpt")
LAST = Path("checkpoints") / "last.ckpt"


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
        raise ConfigError(
            f"expected values that {config.get('_target_')} takes, got {type(cause).__name__} "
            f"({cause}): correct or remove (~group.key) the value."
        ) from error


def make_scheme(config: Config) -> Scheme:
    """Build the scheme of a config; a rule set to null is left out.

    Raises:
        SpecError: If a rule contradicts itself.
        ConfigError: If a rule has unknown keys.
    """
    try:
        rules = {name: Rule(**rule) for name, rule in config["rules"].items() if rule}
    except TypeError as error:
        raise ConfigError(
            f"expected rules with match, weight and activation, got scheme.rules={config['rules']} "
            f"({error}): correct the key."
        ) from error
    return Scheme(config["name"], rules, config["batch_norm"])


def make_model(config: Config, data: DataModule) -> nn.Module:
    """Build the float model of a config for the classes of ``data``.

    Raises:
        ConfigError: If the config names something that is not a module.
    """
    values = {k: v for k, v in config.items() if k != "name"}
    if "_target_" in config:
        model = make(values, num_classes=data.num_classes)
    else:
        if config["name"] == "linear":
            values.setdefault("in_features", int(torch.tensor(data.input_shape).prod()))
        model = build(config["name"], data.num_classes, **values)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch module from model, got {type(model).__name__}.")
    return model


def make_schedule(config: Config) -> Schedule:
    """Build the schedule; a checkpoint replaces the float epochs, trainer.max_epochs caps the run.

    Raises:
        ConfigError: If nothing is left for the quantized part.
    """
    schedule: Schedule = make(config["schedule"])
    if config["ckpt"] is not None:
        schedule = replace(schedule, float_epochs=0)
    total = config["trainer"]["max_epochs"]
    if total is None:
        return schedule
    if total <= schedule.float_epochs:
        raise ConfigError(
            f"expected trainer.max_epochs > schedule.float_epochs={schedule.float_epochs}, got "
            f"{total}: nothing would be left to train quantized; raise one or lower the other."
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
    data: DataModule = make(config["data"], seed=config["seed"])
    data.setup()
    torch.manual_seed(config["seed"])
    model = make_model(config["model"], data)
    if config["ckpt"] is not None:
        load_checkpoint(model, config["ckpt"])
    example = data.calibration_batches(1)[0][:2]
    captured, plan = prepare(model, scheme, example)
    if config["pruning"]["ratio"] > 0:
        Prune(**config["pruning"]).add_masks(captured)
    return Setup(data, captured, plan, schedule, float_bytes(model))


def make_task(setup: Setup, config: Config) -> QATTask:
    """Build the LightningModule of a run."""
    optimizer = config["optimizer"]
    return QATTask(
        setup.captured,
        setup.plan,
        setup.schedule,
        make(optimizer["rates"]),
        make(optimizer["factory"]),
        optimizer["label_smoothing"],
        config=dict(config),
    )


def make_trainer(config: Config, schedule: Schedule) -> pl.Trainer:
    """Build the trainer with its callbacks and loggers.

    Raises:
        ConfigError: If it asks for Lightning's own synchronised batch-norm.
    """
    loggers = [make(c) for c in config["logger"].values() if c]
    callbacks = [make(c) for c in config["callbacks"].values() if c]
    if not loggers:  # Lightning refuses this one without a logger
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    if config["pruning"]["ratio"] > 0:
        callbacks.insert(0, Prune(**config["pruning"]))
    values = {**config["trainer"], "max_epochs": schedule.float_epochs + schedule.epochs}
    if values.pop("sync_batchnorm", False):
        raise ConfigError(
            "expected trainer.sync_batchnorm=false, got true: batch-norms are synchronised over "
            "processes already, on CPUs too; remove it."
        )
    return make(
        values,
        callbacks=callbacks,
        logger=loggers,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def run(cfg: DictConfig) -> Report | None:
    """Train, convert, export, verify and report; ``None`` on all processes but the first.

    Args:
        cfg: The composed config; a run that resumes goes on in its own ``output_dir``.

    Raises:
        QatError: For every mistake a user can make, each in one sentence.
        VerificationError: If the exported file does not predict what training predicted.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # pyright: ignore[reportAssignmentType]
    config["callbacks"] = {k: v for k, v in config["callbacks"].items() if v}
    folder = Path(config["output_dir"])
    resume = resume_path(config["ckpt_path"], folder)
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    setup = set_up(config)
    task, trainer = make_task(setup, config), make_trainer(config, setup.schedule)
    for norm in batch_norms(task.model):
        norm.synchronised = True
    if trainer.is_global_zero:
        write_plan(setup.plan, config, folder)
        log.info("%s", plan_table(setup.plan))
    _fit(trainer, task, setup.data, resume)
    if (folder / LAST).is_file():  # again, with what the callbacks did when training ended
        trainer.save_checkpoint(folder / LAST)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if not trainer.is_global_zero:
        return None
    report = _finish(trainer, setup, config, folder)
    report.verification.check()
    return report


def resume_path(ckpt_path: str | None, folder: Path) -> Path | None:
    """Return the checkpoint to resume from: ``last`` means the run folder's own.

    Raises:
        CheckpointError: If it is not there.
    """
    if ckpt_path is None:
        return None
    path = folder / LAST if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise CheckpointError(
            f"expected a checkpoint to resume from, got none at '{path}': start the run without "
            "ckpt_path, or give the path of a .ckpt file."
        )
    return path


def _fit(trainer: pl.Trainer, task: QATTask, data: DataModule, resume: Path | None) -> None:
    try:
        trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    except (RuntimeError, KeyError, EOFError) as error:
        if resume is None or trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            raise
        raise CheckpointError(
            f"expected a checkpoint of this very run, got {type(error).__name__} "
            f"({str(error).splitlines()[0]}) from '{resume}': resume with the same recipe, or use "
            "ckpt=... to start from its weights."
        ) from error


def _finish(trainer: pl.Trainer, setup: Setup, config: Config, folder: Path) -> Report:
    found: dict[type, Any] = {type(c): c for c in trainer.callbacks}  # pyright: ignore[reportAttributeAccessIssue]
    calibrate, clock = found.get(Calibrate), found.get(Clock)
    report = write_artifact(
        setup.captured,
        setup.plan,
        folder,
        make_evaluation(setup.data, config),
        Baseline(calibrate.float_accuracy if calibrate else None, setup.float_bytes),
        description=describe(setup.data, config),
        seconds=clock.seconds if clock else None,
    )
    metrics = {f"final/{k}": v for k, v in report.accuracy.items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters(config), metrics)
        else:
            logger.log_metrics(metrics, trainer.global_step)
        logger.finalize("success")
    return report


def make_evaluation(data: DataModule, config: Config) -> Evaluation:
    """Return the evaluation set, the whole test set, with the gate's settings."""
    export = config["export"]
    return Evaluation(data.test_dataloader(), export["threshold"], export["site_samples"])


def describe(data: DataModule, config: Config) -> dict[str, Any]:
    """Return the facts that travel inside the exported files."""
    return {
        "name": config["name"],
        "seed": config["seed"],
        "classes": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "input_shape": data.input_shape,
    }


def write_plan(plan: Plan, config: Config, folder: Path) -> None:
    """Write config and plan into ``folder``, so that what lies there can be read without Hydra.

    Raises:
        TrainingError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        (folder / "plan.json").write_text(json.dumps(plan.to_dict(), indent=2) + "\n")
        (folder / "plan.txt").write_text(plan_table(plan) + "\n")
    except OSError as error:
        raise TrainingError(
            f"expected a run folder that can be written, got {error.strerror} at '{folder}': "
            "free space or choose another with hydra.run.dir=..."
        ) from error


def hyperparameters(config: Config) -> dict[str, Any]:
    """Return what sets a run apart, under dotted names, as TensorBoard wants hyper-parameters."""
    return _flat({key: config[key] for key in HYPERPARAMETERS})


def _flat(config: Config, prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{key}."))
        elif not key.startswith("_") or key == "_target_":
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result
