"""From a config to what trains: the task with its optimizer, the trainer with its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from qat.assemble import Config, Setup, make, make_one
from qat.errors import ConfigError
from qat.graph.memory_format import use_channels_last
from qat.training.callbacks import Prune
from qat.training.compiled import training_forward
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from qat.training.task import QATTask


def make_factory(config: Config) -> Callable[[Any], Optimizer]:
    """Build what makes the optimizer, and let it make one of a single parameter.

    Args:
        config: The node ``optimizer.factory``.

    Raises:
        ConfigError: If it makes none of it.
    """
    factory = make(config)
    group = {"params": [nn.Parameter(torch.zeros(1, 1))], "lr": 0.1, "weight_decay": 0.0}
    try:
        optimizer = factory([{**group, "name": "weights"}])
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ConfigError(
            f"expected optimizer.factory with _partial_=true and values that "
            f"{config.get('_target_')} takes, got {type(error).__name__} ({error}): correct them."
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"expected optimizer.factory to make an optimizer, got {type(optimizer).__name__} from "
            f"{config.get('_target_')}: choose a class such as torch.optim.SGD."
        )
    return factory


def make_task(setup: Setup, config: Config) -> QATTask:
    """Build the LightningModule of a run; its model moves to the memory format of the config.

    Raises:
        ConfigError: If ``channels_last``, ``compile`` or ``checkpointing`` is another word.
    """
    if not isinstance(config["channels_last"], bool):
        raise ConfigError(
            f"expected channels_last=true or channels_last=false, got {config['channels_last']!r}: "
            "correct it."
        )
    if config["channels_last"]:
        in_graph = config["compile"] == "regional"
        use_channels_last(setup.captured, setup.data.batch_size if in_graph else None)
    optimizer = config["optimizer"]
    task = QATTask(
        setup.captured,
        setup.plan,
        setup.schedule,
        make_one(optimizer, "rates", Rates),
        make_factory(optimizer["factory"]),
        optimizer["label_smoothing"],
        config=dict(config),
    )
    task.compute = training_forward(setup.captured, config["compile"], config["checkpointing"])
    return task


def make_trainer(config: Config, schedule: Schedule) -> pl.Trainer:
    """Build the trainer with its callbacks and loggers.

    Raises:
        ConfigError: If it asks for Lightning's own synchronised batch-norm.
    """
    make_factory(config["optimizer"]["factory"])
    make_one(config["optimizer"], "rates", Rates)
    loggers = [make_one(config["logger"], k, Logger) for k, c in config["logger"].items() if c]
    callbacks = [
        make_one(config["callbacks"], k, pl.Callback) for k, c in config["callbacks"].items() if c
    ]
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
