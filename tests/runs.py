"""Run the real command in a process of its own, small; callbacks that look into it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

ROOT = Path(__file__).parents[1]
SMALL = [
    "recipe=resnet_w4a8",
    "name=small",
    "data.batch_size=128",
    "schedule.float_epochs=1",
    "schedule.epochs=2",
    "callbacks.calibrate.num_batches=1",
    "callbacks.monitor.histograms=false",
    "trainer.accelerator=cpu",
    "export.threshold=1.0",
    "export.trial=false",  # tests/test_trial.py
    "compile=off",  # no process needs seconds to load compiled kernels; resumes switch them on
]


def hear_signals() -> None:
    """In a child before it starts: what a background shell ignores ends it as usual."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run ``train.py`` inside ``folder`` on one thread; return what it printed and its status."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
    )


class KillAt(pl.Callback):
    """Die by SIGKILL in front of a batch, once: a resumed run finds the mark and lives."""

    def __init__(self, step: int, mark: str) -> None:
        self.step, self.mark = step, Path(mark)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class SaveRank(pl.Callback):
    """Save the model of every rank when training ends."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = pl_module.model
        torch.save(model.state_dict(), self.folder / f"{trainer.global_rank}.pt")
