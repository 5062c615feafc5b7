"""One run: config, objects, training, artifact."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from qat.artifact import Baseline, write_artifact, write_study
from qat.assemble import Config, Setup, describe, make_evaluation, make_schedule, set_up
from qat.batch_norm import batch_norms
from qat.compose import plain
from qat.data import DataModule
from qat.errors import CheckpointError, ConfigError, QatError, reason
from qat.export.outcome import Rate
from qat.export.report import Report
from qat.extensions import modules_of
from qat.fake_quant import fake_quants
from qat.files import write_text
from qat.graph.lint import check, summary
from qat.graph.plan import Plan
from qat.graph.table import plan_table
from qat.graph.targets import find_target
from qat.resume import find_start
from qat.run_folder import CONFIG, LAST, PLAN, is_finished, occupied, unwritable
from qat.trainer import make_task, make_trainer
from qat.training.callbacks import Calibrate, Clock, ProbeRate
from qat.training.checkpoint_io import CheckOptimizers, WholeCheckpoints
from qat.training.ending import Ending
from qat.training.heap import apply_keep_memory
from qat.training.loggers import LogPositions
from qat.training.ranks import WatchRanks
from qat.training.task import QATTask
from qat.trial import try_export

log = logging.getLogger("qat")
UNFIT = (
    RuntimeError,
    LookupError,
    EOFError,
    TypeError,
    ValueError,
    AttributeError,
    MisconfigurationException,  # has more epochs than this run
)
"""What Lightning, PyTorch and callbacks raise over the state of another run, or a changed one."""
HYPERPARAMETERS = (
    "optimizer",
    "schedule",
    "scheme",
    "pruning",
    "distillation",
    "oscillations",
    "initialise",
    "model",
    "prediction",
    "data",
    "seed",
    "ckpt",
    "ckpt_key",
    "ckpt_new_head",
)


def run(cfg: DictConfig) -> Report | None:
    """Train, convert, export, verify and report.

    ``None`` on all processes but the first, and where the run that should go on has finished.

    Args:
        cfg: The composed config; a run that resumes goes on in its own ``output_dir``.

    Raises:
        QatError: For every mistake a user can make, each in one sentence.
        VerificationError: If the exported file does not predict what training predicted.
    """
    config = plain(cfg)
    config["callbacks"] = {k: v for k, v in config["callbacks"].items() if v}
    folder = _folder(config["output_dir"])
    if getattr(rank_zero_only, "rank", 0) != 0:
        return _run(config, folder, find_start(config, folder, is_first=False))
    with _left_as_found(folder):
        start = find_start(config, folder)
    if start is not None and is_finished(folder):
        log.info("this run has finished; artifact and report in %s", folder)
        return None
    with occupied(folder):
        return _run(config, folder, start)


def _folder(given: Any) -> Path:
    if not isinstance(given, str):
        raise ConfigError(f"expected output_dir as a path, got {given!r}: correct or remove it.")
    return Path(given)


@contextmanager
def _left_as_found(folder: Path) -> Iterator[None]:
    """Remove an empty run folder, which Hydra has just made, if the command is refused."""
    try:
        yield
    except QatError:
        with suppress(OSError):  # it has files
            folder.rmdir()
        raise


def _run(config: Config, folder: Path, start: Path | None) -> Report | None:
    target = find_target(config["target"])
    apply_keep_memory(config["keep_memory"])
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    trainer = make_trainer(config, make_schedule(config))  # its mistakes cost no data and no model
    setup = set_up(config)
    config = {**config, "imports": sorted({*config["imports"], *_foreign_modules(setup)})}
    findings = check(setup.plan, target)
    task = make_task(setup, config)
    for norm in batch_norms(task.model):
        norm.synchronised = True
    if trainer.is_global_zero:
        write_plan(setup.plan, config, folder)
        log.info("%s", plan_table(setup.plan))
        for line in summary(findings):
            log.warning("%s", line)
    _try_export(trainer, setup, config, start)
    is_new = _fit(trainer, task, setup.data, start)
    if "last" in config["callbacks"] and is_new:  # again, with what was done when training ended
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


def _try_export(trainer: pl.Trainer, setup: Setup, config: Config, start: Path | None) -> None:
    """Export the untrained model once, where training and an artifact follow."""
    wanted = config["export"].get("trial", True)  # configs of older runs have none
    follows = start is None and trainer.max_epochs != 0 and find_target(config["target"]).exports
    if wanted and follows and trainer.is_global_zero:
        seconds = try_export(setup.captured, config["export"]["storage"])
        log.info("trial export: both files can be written and run (%.1f s)", seconds)


def _foreign_modules(setup: Setup) -> list[str]:
    """Return what a later process has to import, however this one came to know its words."""
    parts = [(type(f.quantizer), type(f.observer)) for f in fake_quants(setup.captured)]
    return modules_of(kind for pair in parts for kind in pair)


def _fit(trainer: pl.Trainer, task: QATTask, data: DataModule, start: Path | None) -> bool:
    """Train; return whether anything was done, as after a resume there may be nothing left."""
    watch, ending = WatchRanks(), Ending()
    trainer.callbacks[:0] = [CheckOptimizers(), watch, LogPositions()]  # pyright: ignore[reportAttributeAccessIssue]
    trainer.callbacks.append(ending)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    try:
        trainer.fit(task, datamodule=data, ckpt_path=start, weights_only=True)
    except UNFIT as error:
        if trainer.world_size > 1:
            watch.await_news()  # a collective fails where another process died
        watch.end()
        if start is None or (watch.trains and not isinstance(error, MisconfigurationException)):
            raise
        raise CheckpointError(
            f"expected a checkpoint of this very run, got {reason(error)} from '{start}': resume "
            "with the same recipe, or use ckpt=... to start from its weights."
        ) from error
    except BaseException:
        watch.end()
        raise
    return start is None or watch.trains or ending.catch_up(trainer, task)


def _finish(trainer: pl.Trainer, setup: Setup, config: Config, folder: Path) -> Report:
    found: dict[type, Any] = {type(c): c for c in trainer.callbacks}  # pyright: ignore[reportAttributeAccessIssue]
    calibrate, clock = found.get(Calibrate), found.get(Clock)
    write = write_artifact if find_target(config["target"]).exports else write_study
    report = write(
        setup.captured,
        setup.plan,
        folder,
        make_evaluation(setup.data, config),
        Baseline(calibrate.scores if calibrate else {}, setup.float_bytes, _rate(trainer, setup)),
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


def _rate(trainer: pl.Trainer, setup: Setup) -> Rate | None:
    """Return what the quantized part was trained with, and what a probe found, if one did."""
    task: Any = trainer.lightning_module
    if setup.schedule.epochs == 0:
        return None
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, ProbeRate) and callback.chosen is not None:
            return Rate(callback.chosen, callback.tried, callback.untrained)
    return Rate(task.rates.highest)


def write_plan(plan: Plan, config: Config, folder: Path) -> None:
    """Write plan and config into ``folder``, so that what lies there can be read without Hydra.

    Raises:
        TrainingError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN, json.dumps(plan.to_dict(), indent=2) + "\n")
        write_text(folder / "plan.txt", plan_table(plan) + "\n")
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    except OSError as error:
        raise unwritable(folder, error) from error


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
