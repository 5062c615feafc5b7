"""A signal ends a command with a sentence and the status that shells know; nothing is half."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT, hear_signals, train

SCRIPT = """
import os, sys, time
from pathlib import Path
from qat import signals
from qat.files import replacing
signals.listen(speaks=sys.argv[2] != "silent")
signals.advise(lambda: "do this")
Path("model").write_text("old")
if sys.argv[2] == "worker" and os.fork() == 0:
    os.kill(os.getpid(), int(sys.argv[1])); os.kill(os.getpid(), 15)
try:
    with replacing("model") as stream:
        stream.write(b"half of the new")
        if sys.argv[2] == "worker":
            assert os.waitstatus_to_exitcode(os.wait()[1]) == -15
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(20)
finally:
    if sys.argv[2] == "twice":
        os.kill(os.getpid(), 15); time.sleep(20)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kind", ["once", "twice", "silent", "worker"])
def test_a_signal_is_a_sentence_and_a_status(number, kind, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(int(number)), kind]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        preexec_fn=hear_signals,
    )
    said = "" if kind == "silent" else f"qat: stopped by {number.name}: do this\n"
    assert done.stderr == said
    assert done.returncode == 128 + (15 if kind == "twice" else number)
    assert (tmp_path / "model").read_text() == "old"


def test_what_is_ignored_stays_ignored(tmp_path):
    """As ``nohup`` and shells in scripts start a command."""
    code = (
        "import signal, os; signal.signal(1, signal.SIG_IGN); from qat import signals;"
        "signals.listen(); os.kill(os.getpid(), 1); print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout, done.returncode) == ("alive\n", 0)


def start(folder, *overrides):
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        preexec_fn=hear_signals,  # noqa: PLW1509 (only sets signals)
    )


def test_a_stopped_run_says_how_to_go_on_and_no_other_may(tmp_path):
    command = ["recipe=tabular_w8a8", "schedule.float_epochs=90", "name=a b", "logger=none"]
    with start(tmp_path, *command) as run:
        assert run.stdout is not None
        assert any(line.startswith("epoch 2/") for line in run.stdout)
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 130
        assert run.stderr is not None
        (sentence,) = run.stderr.read().splitlines()
    words = shlex.split(sentence.partition("go on with: ")[2])
    assert words == ["python", str(ROOT / "train.py"), *command, "ckpt_path=last"]
    (folder,) = tmp_path.glob("runs/a b/*")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == [".lock", "checkpoints/last.ckpt", "config.yaml", "plan.json", "plan.txt"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    refused = train(tmp_path, *words[2:], "data.batch_size=50")
    assert refused.returncode == 1
    assert "data.batch_size: 100 -> 50" in refused.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_run_without_a_checkpoint_is_to_be_started_again(tmp_path):
    with start(tmp_path, "recipe=tabular_w8a8", "schedule.float_epochs=90") as run:
        time.sleep(1.5)  # it imports, and has not begun
        run.terminate()
        assert run.wait(30) == 143
        assert run.stderr is not None
        sentence = run.stderr.read()
    assert sentence.startswith("qat: stopped by SIGTERM: ")
    assert "start" in sentence
    assert "ckpt_path" not in sentence
    assert "Traceback" not in sentence
