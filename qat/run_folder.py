"""The folder of a run: which one it is, what lies there, and that one process at a time uses it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from qat.errors import TrainingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LAST = Path("checkpoints") / "last.ckpt"
CONFIG, PLAN, LOCK = "config.yaml", "plan.json", ".lock"
TIME = "%Y-%m-%d_%H-%M-%S-%f"
_STARTED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}")


def run_dir(name: str, ckpt_path: str | None) -> str:
    """Return the folder of a run: a new one, or, to resume, the one that holds the checkpoint.

    Args:
        name: The run's name.
        ckpt_path: ``last`` for the newest run of that name, a checkpoint's path, or ``None``.
    """
    home = Path("runs") / str(name)
    if ckpt_path == "last":
        known = newest(home)
        if known is not None:
            return str(known)
    elif ckpt_path is not None and (Path(str(ckpt_path)).parent.parent / PLAN).is_file():
        return str(Path(str(ckpt_path)).parent.parent)
    return str(home / datetime.now().strftime(TIME))


def newest(home: Path) -> Path | None:
    """Return the run below ``home`` that started last, by the time that its folder is named for."""
    runs = [p.parent for p in home.glob(f"*/{CONFIG}") if _STARTED.fullmatch(p.parent.name)]
    return max(runs, key=lambda run: run.name, default=None)


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` ended with its report, and its proof passed."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(report, dict) or "passed" not in report or _died_there(folder):
        return False
    files = [] if report["passed"] is None else _models(folder)
    return report["passed"] is not False and all(path.is_file() for path in files)


def _models(folder: Path) -> list[Path]:
    from qat.gate import ONNX, PACKED  # brings the runtimes with it

    return [folder / ONNX, folder / PACKED]


def _died_there(folder: Path) -> bool:
    """Whether a process died before it had left ``folder``: it would have emptied its lock."""
    path = folder / LOCK
    return path.is_file() and path.stat().st_size > 0


def check_free(folder: Path) -> None:
    """Check that a new run would overwrite nothing; a run that saved nothing yet is nothing.

    Raises:
        TrainingError: If it would.
    """
    results = [p for p in (*_models(folder), folder / "report.json") if p.exists()]
    found = [*sorted((folder / LAST.parent).glob("*.ckpt")), *results]
    if not (folder / PLAN).exists():  # files of these names are somebody else's
        names = (CONFIG, "plan.txt", "report.md")
        found += [folder / name for name in names if (folder / name).exists()]
    if found:
        raise TrainingError(
            f"expected a folder for a new run, got '{folder}' with {found[0].relative_to(folder)}: "
            "go on with the run that is there (ckpt_path=last), choose another folder with "
            "hydra.run.dir=..., or remove this one."
        )


def check_unused(folder: Path) -> None:
    """Check that no other process uses ``folder``, without writing anything.

    Raises:
        TrainingError: If one does.
    """
    try:
        with (folder / LOCK).open("r+", encoding="utf-8") as stream:
            _lock(stream, folder)
    except OSError:
        pass  # none there, or only for reading


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Make ``folder`` and use it alone; the system lets go of it when the process dies.

    Raises:
        TrainingError: If another process uses it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from error
    with stream:
        _lock(stream, folder)
        _write(stream, folder, str(os.getpid()))
        yield
        _write(stream, folder, "")


def _lock(stream: IO[str], folder: Path) -> None:
    """Lock a file for this process; not for those that it forks, so they hold nothing."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stream.seek(0)
        raise TrainingError(
            f"expected a run folder that no other process uses, got '{folder}', which process "
            f"{stream.read(20).strip() or '(unknown)'} trains in: wait for it, end it, or start a "
            "new run without ckpt_path."
        ) from None
    except OSError:
        pass  # a file system without locks


def _write(stream: IO[str], folder: Path, text: str) -> None:
    try:
        stream.truncate(0)
        stream.write(text)
        stream.flush()
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> TrainingError:
    """Return the sentence for a run folder that cannot be written."""
    return TrainingError(
        f"expected a run folder that can be written, got {error.strerror} at '{folder}': "
        "free space or choose another with hydra.run.dir=..."
    )
