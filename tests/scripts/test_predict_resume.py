"""A prediction that is killed goes on, and what it shows on a terminal stays on the terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "predict.py"
ROWS, LINES = 6000, 2600
LISTENING = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
GIVEN = ("--batch", "256", "--top", "4")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows of four features, every hundredth of them unreadable."""
    x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    x[::100] = np.nan
    np.save(path := tmp_path_factory.mktemp("data") / "x.npy", x)
    return path


def start(*arguments, **how):
    command = [sys.executable, "-c", LISTENING, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        **how,
    )


def stop(process, number):
    """Send a signal in the middle: the process waits for somebody to read what it prints.

    What it prints ends only when its workers have ended too.
    """
    for _ in range(LINES):
        process.stdout.readline()
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


def contents(path):
    """Return the bytes of an output and of what is beside it."""
    files = [path, *sorted(path.glob("*")), *sorted(path.parent.glob(f"{path.name}.*"))]
    return {f.name.removeprefix(path.stem): f.read_bytes() for f in files if f.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "workers"), [("csv", 0), ("json", 0), ("jsonl", 2), ("parquet", 2)]
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where cores are fewer
def test_a_killed_prediction_ends_with_the_same_bytes(
    kind, workers, table_run, table, call, tmp_path
):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    given = (table_run / "model.onnx", table, *GIVEN, f"--{kind}")
    whole, out = tmp_path / f"whole.{kind}", tmp_path / f"out.{kind}"
    assert call("predict", *given, whole)[0] == 0
    process = start(*given, out, "--workers", workers)
    stop(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    state = json.loads((tmp_path / f"out.{kind}.state.json").read_text())
    assert 0 < state["predicted"] < ROWS * 0.9
    assert contents(out) != contents(whole)

    status, shown, error = call("predict", *given, out, "--workers", workers, "--resume")
    assert status == 0
    assert contents(out) == contents(whole)
    assert len(shown.splitlines()) == ROWS * 0.99 - state["predicted"]
    assert error.count("left out ") == ROWS / 100


def test_ctrl_c_is_a_sentence_and_goes_on(table_run, table, call, tmp_path):
    out = tmp_path / "out.csv"
    given = (table_run / "model.onnx", table, *GIVEN, "--csv", out)
    process = start(*given, "--workers", 1, stderr=subprocess.PIPE)
    error = stop(process, signal.SIGINT)
    assert (process.returncode, error.count("\n")) == (130, 1)
    assert error.startswith("qat: stopped by SIGINT: --resume goes on")
    assert call("predict", *given, "--resume")[0] == 0
    assert json.loads((tmp_path / "out.csv.state.json").read_text())["finished"]


def test_refusals(table_run, table, refuse, call, tmp_path):
    given = (table_run / "model.onnx", table, *GIVEN)
    assert "expected an output with --resume" in refuse("predict", *given, "--resume")
    assert "expected an output with --resume" in refuse("predict", *given, "--force")
    out = ("--csv", tmp_path / "out.csv")
    assert call("predict", *given, *out)[0] == 0
    assert "out.csv' exists" in refuse("predict", *given, *out)
    other = ("--top", 3, *out, "--resume")
    assert "the same top, which was 4 and is 3" in refuse("predict", *given, *other)
    assert call("predict", *given, *out, "--force")[0] == 0
    assert call("predict", *given, *out, "--force", "--resume")[0] == 2
    missing = ("--csv", tmp_path / "no" / "out.csv")
    assert "no/" in refuse("predict", *given, *missing)
    assert "expected" in refuse("predict", *given, "--csv", tmp_path, "--force")


@pytest.mark.parametrize("top", [1, 1000])
def test_a_finished_one_has_nothing_to_do(top, table_run, table, call, tmp_path):
    out = ("--csv", tmp_path / "out.csv", "--top", top)
    call("predict", table_run / "model.onnx", table, *out)
    before = contents(tmp_path / "out.csv")
    status, shown, error = call("predict", table_run / "model.onnx", table, *out, "--resume")
    assert (status, shown, error.count("left out ")) == (0, "", ROWS / 100)
    assert contents(tmp_path / "out.csv") == before


def test_bar_and_closing_line_are_for_terminals(table_run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((200, 4)))
    main, terminal = pty.openpty()
    process = start(table_run / "model.onnx", tmp_path / "x.npy", stderr=terminal)
    shown, _ = process.communicate(timeout=60)
    os.close(terminal)
    seen = b""
    while chunk := read(main):
        seen += chunk
    assert len(shown.splitlines()) == 200
    assert b"200/200" in seen
    assert b"predicted 200, left out 0, " in seen
    assert seen.endswith(b" inputs/s\r\n")


def read(terminal):
    """Return what is left to read; the end of a terminal is an error."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""
