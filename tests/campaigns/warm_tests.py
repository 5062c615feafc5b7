"""Tests run in forks of one process that has imported what takes long: seconds less for each run.

``qat`` and the tests are imported in the forks alone, so that each sees its files as they are then.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

OPTIONS = (
    "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow and not gpu",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # of plugins that are imported already
)  # fmt: skip


class WarmTests:
    """A process that runs test files of a folder until the first test fails.

    Args:
        folder: Holds ``qat`` and ``tests``.
        seconds: What never ends is stopped then, and has failed.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.log = folder / "tests.log"
        """What the last run printed."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaigns.warm_tests", str(self.log), str(seconds)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, files: list[str]) -> bool:
        """Return whether every test of ``files`` passes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(files) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()) == 0

    def first_failure(self) -> str:
        """Return the first test that failed in the last run, or why there is none."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((x for x in lines if x.startswith(("FAILED", "ERROR"))), "no test ended")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def _run(files: list[str], log: Path, seconds: float) -> int:
    """Return the exit status of pytest in a fork; of one that is killed, or runs out of time, 1."""
    child = os.fork()
    if child == 0:
        os.setsid()  # its own processes end with it
        with log.open("wb") as out, Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        status = 1
        try:
            status = int(pytest.main([*OPTIONS, *files]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end, done = time.monotonic() + seconds, (0, 0)
    while done[0] == 0 and time.monotonic() < end:
        time.sleep(0.02)
        done = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if done[0] == 0:
        os.waitpid(child, 0)
        return 1
    return os.waitstatus_to_exitcode(done[1]) and 1


def _serve(log: Path, seconds: float) -> None:
    importlib.import_module("tests.preload")
    for line in sys.stdin:
        print(_run(line.split(), log, seconds), flush=True)  # noqa: T201 (the answer)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), float(sys.argv[2]))
