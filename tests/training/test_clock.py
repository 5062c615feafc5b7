"""Where the progress bar shows: in a terminal, and not in a file."""

import os
import pty
import subprocess
import sys
import termios

from tests.runs import ROOT, train

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
