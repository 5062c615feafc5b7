"""A progress bar for people: on stderr, and only on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn


class Bar:
    """Inputs done of all, the time that is left, and a closing line.

    Args:
        total: Inputs in all.
        before: Inputs that were done before this process began.
    """

    def __init__(self, total: int, before: int = 0) -> None:
        self.shown = sys.stderr.isatty()
        self.progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what is printed goes above; a pipe stays a pipe
            disable=not self.shown,
        )
        self.task = self.progress.add_task("", total=total, completed=min(before, total))
        self.done, self.began = 0, time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, count: int) -> None:
        """Say that ``count`` more inputs are done."""
        self.done += count
        self.progress.advance(self.task, count)

    def close(self, predicted: int, left_out: int) -> None:
        """Print the closing line."""
        rate = self.done / (time.monotonic() - self.began)
        if self.shown:
            sys.stderr.write(f"predicted {predicted}, left out {left_out}, {rate:.1f} inputs/s\n")
