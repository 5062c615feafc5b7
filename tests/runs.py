"""Run the real command in a process of its own, small; callbacks that look into it."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

ROOT = Path(__file__).parents[1]
OUTPUTS = ("out", "err")
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


def fork(target: Callable[..., None], *args: Any) -> Any:
    """Start a process that forks from one which has imported the libraries: seconds less for it."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.preload"])
    process = forks.Process(target=target, args=args)
    process.start()
    return process


def start(folder: Path, *overrides: str) -> Any:
    """Start ``train.py`` inside ``folder`` on one thread; it prints to ``OUTPUTS`` there."""
    folder.mkdir(parents=True, exist_ok=True)
    return fork(_run_train, folder, overrides)


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run ``train.py`` inside ``folder`` on one thread; return what it printed and its status."""
    process = start(folder, *overrides)
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"train.py in {folder} did not end")
    texts = [(folder / name).read_text() for name in OUTPUTS]
    for name in OUTPUTS:
        (folder / name).unlink()
    return subprocess.CompletedProcess(overrides, process.exitcode, *texts)


def _run_train(folder: Path, overrides: tuple[str, ...]) -> None:
    """In the child: become the command, down to the descriptors of its output."""
    for number, name in enumerate(OUTPUTS, 1):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sys.argv = [str(ROOT / "train.py"), *overrides]
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork of multiprocessing leaves without them
        sys.stdout.flush()
        sys.stderr.flush()


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
