"""A process of its own for every file and runtime, so that its memory is that file's alone."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subject import Subject

if TYPE_CHECKING:
    from qat.errors import ExportError

STATUS = Path("/proc/self/status")


class Worker:
    """The parent's end of a process that has loaded its file.

    Args:
        subject: The file.
        runtime: Name of the runtime.
        threads: Threads that it may use.

    Raises:
        ExportError: If the runtime is not installed or refuses the file.
    """

    def __init__(self, subject: Subject, runtime: str, threads: int) -> None:
        self.subject, self.runtime = subject, runtime
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, subject, runtime, threads), daemon=True
        )
        self.process.start()
        other.close()
        self.load_seconds: float = self._receive()

    def measure(self, batch: int, seconds: float) -> list[float]:
        """Return the seconds that each call took: one call or more, for ``seconds`` in all.

        Raises:
            ExportError: If the runtime cannot run a batch of that size.
        """
        return self._ask("measure", batch, seconds)

    def peak_bytes(self) -> int:
        """Return the most memory that file and calls took so far, beyond the libraries."""
        return self._ask("peak")

    def close(self) -> None:
        """End the process."""
        self.connection.close()  # it stops where there is nobody to ask
        self.process.join()

    def _ask(self, *request: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then receiving says what happened
            self.connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        from qat.errors import ExportError

        try:
            value = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join()
            raise ExportError(
                f"expected '{self.subject.name}' to run in {self.runtime}, got the end of its "
                f"process (exit status {self.process.exitcode}): free memory, or leave it out."
            ) from error
        if isinstance(value, ExportError):
            raise value
        return value


def _serve(connection: Connection, subject: Subject, runtime: str, threads: int) -> None:
    """Load, say how long it took, and answer until the parent has gone."""
    from qat.errors import ExportError
    from qat.runtimes.table import find_runtime, load_runtime

    with contextlib.suppress(ImportError):  # so that its time and memory are not the file's
        importlib.import_module(find_runtime(runtime).package)
    before = _reset_memory()
    try:
        start = time.perf_counter()
        model = load_runtime(runtime, subject.path, threads=threads)
        connection.send(time.perf_counter() - start)
    except ExportError as error:
        connection.send(error)
        return
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            name, *values = connection.recv()
            if name == "peak":
                connection.send(max(0, _peak_memory() - before))
            else:
                connection.send(_measure(model, subject, *values))


def _measure(
    model: Callable[[Any], Any], subject: Subject, batch: int, seconds: float
) -> list[float] | ExportError:
    """Time calls; the first is not counted, since others had the machine in between."""
    from qat.errors import ExportError

    x = subject.batch(batch)
    try:
        model(x)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    except Exception as error:  # runtimes raise classes of their own
        reason = str(error).strip().splitlines()[-1]
        return ExportError(
            f"expected '{subject.name}' to run a batch of {batch}, got {reason}: choose "
            "other sizes with --batch, or export it with a dynamic batch axis."
        )
    return times


def _reset_memory() -> int:
    """Return the bytes in use, and start to look for the peak from there, where Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") if STATUS.exists() else _peak_memory()


def _peak_memory() -> int:
    """Return the most bytes that were in use at once."""
    if STATUS.exists():  # what getrusage says there includes the parent's, from before exec
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[name].split()[0]) * 1024
