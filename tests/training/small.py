"""A small task, its data, and a trainer for tests of callbacks: 5 epochs of 8 steps."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat.graph.insert import prepare
from qat.spec import BatchNormMode
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from qat.training.task import QATTask
from tests.helpers import make_scheme

LEARNED = {"quantizer": "lsq", "observer": "min_max"}
EPOCHS = 5
STEPS = 8 * EPOCHS


class Data(pl.LightningDataModule):
    """64 images ``(4, 5, 5)`` of 3 classes, in batches of 8."""

    num_classes = 3
    is_random = False

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(1))
        self.y = torch.arange(64) % 3

    def loader(self) -> Any:
        return DataLoader(TensorDataset(self.x, self.y), 8)

    train_dataloader = val_dataloader = test_dataloader = loader

    def training_inputs(self) -> list[Tensor]:
        return list(self.x.split(8))

    def calibration_batches(self, num: int) -> list[Tensor]:
        return list(self.x.split(8)[:num])

    def labelled_batches(
        self, num: int, *, most: int | None = None, augmented: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        del augmented
        size = most or 8
        return list(zip(self.x.split(size), self.y.split(size), strict=True))[:num]


def make_task(
    bits: int = 4,
    schedule: Schedule | None = None,
    *,
    quantizer: dict[str, Any] | None = None,
    activation: dict[str, Any] | None = None,
    batch_norm: BatchNormMode = "late",
    optimizer: Any = None,
) -> QATTask:
    """A convolution with its batch-norm and a linear layer, with learned scales."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    )
    fields = quantizer or LEARNED
    reads = activation or fields
    scheme = make_scheme(bits, bits, weight=fields, activation=reads, batch_norm=batch_norm)
    captured, plan = prepare(model, scheme, torch.randn(2, 4, 5, 5))
    make = optimizer or partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    return QATTask(captured, plan, schedule or Schedule(0, EPOCHS), Rates(0.05, 0.05), make)


def fit(
    task: QATTask,
    *callbacks: pl.Callback,
    resume: Path | None = None,
    epochs: int = EPOCHS,
    data: pl.LightningDataModule | None = None,
    **values: Any,
) -> pl.Trainer:
    """Train ``task``, quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            **values,
        )
        trainer.fit(
            task, datamodule=data or Data(), ckpt_path=resume, weights_only=bool(resume) or None
        )
    return trainer


class Save(pl.Callback):
    """Save a checkpoint when the second epoch ends: step 16."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two models hold the same bits under the same names."""
    a, b = ours.state_dict(), theirs.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
