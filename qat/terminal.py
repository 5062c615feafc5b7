"""What is printed: in characters that any terminal can hold, and none that command it.

Names of files, classes and layers come from files of other people. An escape sequence in one could
clear the screen or retitle the window, a carriage return hide what stands before it.
"""

from __future__ import annotations

import io
import logging
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

READER_LEFT = 141
"""Exit status of a command whose output nobody reads any more: 128 + SIGPIPE, as shells say it."""
_COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # ends of lines, direction of writing
    "\ud800-\udfff]"  # bytes of file names that are no text
)


def escape(text: str, keep: str = "") -> str:
    """Return ``text`` with what would command a terminal written as in Python source.

    Args:
        text: Anything.
        keep: Characters that stay as they are.
    """

    def written(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return _COMMANDS.sub(written, text)


def show(text: str) -> None:
    """Print lines; names in them cannot command the terminal."""
    sys.stdout.write(escape(text, keep="\n\t") + "\n")


class PlainRecord(logging.LogRecord):
    """A line of a log without escape sequences."""

    def getMessage(self) -> str:  # noqa: N802  of the standard library
        """Return the message; lines stay lines."""
        return escape(super().getMessage(), keep="\n\t")


@contextmanager
def terminal() -> Iterator[None]:
    """Run a command with streams that take every character, and end quietly with its reader.

    ``command | head -1`` ends with exit status 141 and no word, as with other tools.
    """
    _prepare()
    try:
        try:
            yield
        finally:
            _flush()
    except BrokenPipeError:
        if not reader_left():
            raise
        _silence()
        sys.exit(READER_LEFT)


def reader_left() -> bool:
    """Return whether the process that read our output has ended."""
    if not hasattr(select, "poll"):
        return True  # Windows: nothing else breaks a pipe of ours there
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _prepare() -> None:
    """Open the streams that the caller has closed, before a file of ours takes their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(PlainRecord)
    logging.raiseExceptions = False  # a line that nobody can read stops nothing, and is no news


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence()
        sys.stderr.write(
            f"qat: expected to print to the standard output, got {error}: free space there.\n"
        )
        sys.exit(1)
    sys.stderr.flush()


def _silence() -> None:
    """Send what is still to be printed nowhere: Python would complain about it when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
