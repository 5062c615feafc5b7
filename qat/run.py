"""One run: config, objects, training, artifact."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from qat.artifact import Baseline, write_artifact, write_study
from qat.assemble import Config, Setup, describe, make_evaluation, make_schedule, set_up
from qat.batch_norm import batch_norms
from qat.compose import plain
from qat.data import DataModule
from qat.errors import CheckpointError, TrainingError
from qat.export.report import Report
from qat.graph.lint import check, summary
from qat.graph.plan import Plan
from qat.graph.table import plan_table
from qat.graph.targets import find_target
from qat.trainer import make_task, make_trainer
from qat.training.callbacks import Calibrate, Clock
from qat.training.heap import apply_keep_memory
from qat.training.task import QATTask

log = logging.getLogger("qat")
HYPERPARAMETERS = (
    "optimizer",
    "schedule",
    "scheme",
    "pruning",
    "distillation",
    "oscillations",
    "initialise",
    "model",
    "data",
    "seed",
    "ckpt",
)
LAST = Path("checkpoints") / "last.ckpt"


def run(cfg: DictConfig) -> Report | None:
    """Train, convert, export, verify and report; ``None`` on all processes but the first.

    Args:
        cfg: The composed config; a run that resumes goes on in its own ``output_dir``.

    Raises:
        QatError: For every mistake a user can make, each in one sentence.
        VerificationError: If the exported file does not predict what training predicted.
    """
    config = plain(cfg)
    config["callbacks"] = {k: v for k, v in config["callbacks"].items() if v}
    folder, target = Path(config["output_dir"]), find_target(config["target"])
    resume = resume_path(config["ckpt_path"], folder)
    apply_keep_memory(config["keep_memory"])
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    trainer = make_trainer(config, make_schedule(config))  # its mistakes cost no data and no model
    setup = set_up(config)
    findings = check(setup.plan, target)
    task = make_task(setup, config)
    for norm in batch_norms(task.model):
        norm.synchronised = True
    if trainer.is_global_zero:
        write_plan(setup.plan, config, folder)
        log.info("%s", plan_table(setup.plan))
        for line in summary(findings):
            log.warning("%s", line)
    _fit(trainer, task, setup.data, resume)
    if "last" in config["callbacks"]:  # again, with what the callbacks did when training ended
        trainer.save_checkpoint(folder / LAST)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if not trainer.is_global_zero:
        return None
    setup.captured.to(memory_format=torch.contiguous_format)  # as files store it
    report = _finish(trainer, setup, config, folder)
    if not report.is_study:
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
    except (RuntimeError, KeyError, EOFError, MisconfigurationException) as error:
        longer = isinstance(error, MisconfigurationException)  # has more epochs than this run
        started = trainer.fit_loop.epoch_loop.batch_progress.current.ready and not longer
        if resume is None or started:
            raise
        raise CheckpointError(
            f"expected a checkpoint of this very run, got {type(error).__name__} "
            f"({str(error).splitlines()[0]}) from '{resume}': resume with the same recipe, or use "
            "ckpt=... to start from its weights."
        ) from error


def _finish(trainer: pl.Trainer, setup: Setup, config: Config, folder: Path) -> Report:
    found: dict[type, Any] = {type(c): c for c in trainer.callbacks}  # pyright: ignore[reportAttributeAccessIssue]
    calibrate, clock = found.get(Calibrate), found.get(Clock)
    write = write_artifact if find_target(config["target"]).exports else write_study
    report = write(
        setup.captured,
        setup.plan,
        folder,
        make_evaluation(setup.data, config),
        Baseline(calibrate.scores if calibrate else {}, setup.float_bytes),
        description=describe(setup.data, config),
        seconds=clock.seconds if clock else None,
    )
    metrics = {f"final/{k}": v for k, v in report.accuracy.items()}
    metrics |= {f"final_perplexity/{k}": v for k, v in report.perplexity.items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters(config), metrics)
        else:
            logger.log_metrics(metrics, trainer.global_step)
        logger.finalize("success")
    return report


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
    for name, value in config.items():
        key = str(name)  # bits are numbers
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{key}."))
        elif not key.startswith("_") or key == "_target_":
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result
