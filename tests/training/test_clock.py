"""What a phase has taken, and where the progress bar shows: in a terminal, and not in a file."""

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch

from qat.training.callbacks import Clock, EpochLines, clock as clock_module
from tests.helpers import calibrate
from tests.runs import ROOT, train
from tests.training.small import Data, make_task


def test_seconds_go_to_the_phase_that_the_model_is_in(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock, task, trainer = Clock(), make_task(), cast(Any, SimpleNamespace(max_epochs=1))

    def at(moment: float, event: Callable[..., None], *more: Any) -> None:
        now[0] = moment
        event(trainer, task, *more)

    batch = None, None, 0
    at(105.0, clock.on_fit_start)  # what is done in front of training counts for nothing
    at(110.0, clock.on_train_start)
    at(111.0, clock.on_train_batch_end, *batch)
    at(113.0, clock.on_train_batch_end, *batch)
    assert clock.seconds == {"float": 3.0}
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    at(117.0, clock.on_train_batch_end, *batch)
    at(125.0, clock.on_train_end)
    assert clock.state_dict() == {"seconds": {"float": 3.0, "quantize": 12.0}}

    resumed = Clock()
    resumed.load_state_dict(clock.state_dict())
    trainer.max_epochs = 0
    at(130.0, resumed.on_fit_start)  # nothing is trained, and all was counted
    assert resumed.seconds == clock.seconds
    alone = Clock()
    at(133.0, alone.on_fit_start)
    assert alone.seconds == {"quantize": 3.0}


def test_lines_of_epochs(caplog):
    metrics = {"val/accuracy": torch.tensor(12.3456), "train/loss": 0.5, "val/loss": 1.0}
    values = {"current_epoch": 1, "max_epochs": 5, "callback_metrics": metrics}
    task = make_task()
    with caplog.at_level("INFO", "qat"):
        for checking, first in ((False, True), (True, True), (False, False), (False, True)):
            trainer = SimpleNamespace(sanity_checking=checking, is_global_zero=first, **values)
            EpochLines().on_validation_end(cast(Any, trainer), task)
            if not first:
                del metrics["train/loss"]  # before the first step
    assert caplog.messages == [
        "epoch 2/5  [float]  train/loss 0.5  val/accuracy 12.35",
        "epoch 2/5  [float]  val/accuracy 12.35",
    ]


OPTIONS = ["recipe=tabular_w8a8", "schedule.float_epochs=1", "schedule.epochs=1", "logger=none"]


def in_terminal(folder) -> str:
    """Run the command with a terminal as its output and return what appeared there."""
    outside, inside = pty.openpty()
    termios.tcsetwinsize(inside, (40, 200))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *OPTIONS]
    run = subprocess.Popen(
        command, stdout=inside, stderr=subprocess.STDOUT, cwd=folder, env=environment
    )
    os.close(inside)
    shown = b""
    try:
        while part := os.read(outside, 65536):
            shown += part
    except OSError:  # how a terminal tells that the other side is gone
        pass
    os.close(outside)
    assert run.wait() == 0
    return shown.decode()


def test_terminal_shows_the_phase_of_every_moment(tmp_path):
    shown = in_terminal(tmp_path)
    assert "phase=float" in shown
    assert "phase=fold" in shown


def test_file_gets_one_line_for_every_epoch(tmp_path):
    done = train(tmp_path, *OPTIONS)
    assert "phase=" not in done.stdout + done.stderr
    assert [x.split()[1] for x in done.stdout.splitlines() if x.startswith("epoch")] == [
        "1/2",
        "2/2",
    ]
