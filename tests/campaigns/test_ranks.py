"""One of two processes dies, or both are stopped: all end soon, with one sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, hear_signals

COMMAND = ["recipe=tabular_w8a8", "schedule.float_epochs=90", "hydra.run.dir=run"]
TWO = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for children in /proc"),
]


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def send(who: str, run: subprocess.Popen[str], child: int) -> None:
    if who == "second":
        os.kill(child, signal.SIGKILL)
    elif who == "first":
        run.kill()
    elif who == "both":  # as a terminal does
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.send_signal(signal.Signals[who])


def start(folder: Path) -> subprocess.Popen[str]:
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *COMMAND, *TWO],
            cwd=folder,
            stdout=log,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            preexec_fn=hear_signals,  # noqa: PLW1509 (only sets signals)
        )


@pytest.mark.parametrize(
    ("who", "status", "words"),
    [
        ("second", 1, "one that ended with status -9"),
        ("first", -9, "the end of the first"),
        ("both", 130, "stopped by SIGINT"),
        ("SIGTERM", 143, "stopped by SIGTERM"),
        ("SIGHUP", 129, "stopped by SIGHUP"),
    ],
)
def test_no_process_is_left_behind(who, status, words, tmp_path):
    run = start(tmp_path)
    try:
        wait_for(lambda: "epoch 2/" in (tmp_path / "log").read_text(), 200)
        (child,) = children(run.pid)
        send(who, run, child)
        assert run.wait(30) == status
        wait_for(lambda: not Path(f"/proc/{child}").exists(), 15)
    finally:
        run.kill()
    said = (tmp_path / "log").read_text()
    (sentence,) = re.findall("^qat: .*", said, re.MULTILINE)
    assert words in sentence
    assert sentence.endswith(" ".join([*COMMAND, *TWO, "ckpt_path=last"]))
    assert "Traceback" not in said


def test_the_second_ends_if_the_first_dies_before_they_have_met(tmp_path):
    run = start(tmp_path)
    try:
        wait_for(lambda: children(run.pid), 100)
        (child,) = children(run.pid)
        run.kill()
        run.wait()
        wait_for(lambda: not Path(f"/proc/{child}").exists(), 60)
    finally:
        run.kill()


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
