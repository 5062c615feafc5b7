"""Signals that end a process: one sentence, exit status 128 + the signal's number, no half files.

The first signal raises ``SystemExit`` in the main thread, so that files being written are dropped
and workers ended; a second one, or ten seconds without an end, ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from qat.files import write_all

SECONDS = 10.0
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


def again() -> str:
    """Return the advice where no one gave better."""
    return "no half-written file is left; start the command again"


class _State:
    """Of this process: who listens, what to advise, and whether a signal has come."""

    pid = 0
    speaks = True
    stopping = False
    advice: tuple[Callable[[], str]] = (again,)


def listen(*, speaks: bool = True) -> None:
    """End this process as the module says; signals that are ignored (``nohup``) stay ignored.

    Args:
        speaks: Whether to print the sentence; of several processes of a run only one does, and the
            others end at once.
    """
    _State.pid, _State.speaks = os.getpid(), speaks
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets only the main thread set handlers
    for number in _numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def advise(advice: Callable[[], str]) -> None:
    """Set what a stopped process says about going on; it is asked when a signal has come."""
    _State.advice = (advice,)


def stopping() -> bool:
    """Whether a signal has come."""
    return _State.stopping


def leave(sentence: str, status: int) -> NoReturn:
    """Print ``sentence`` with the advice and end the process at once, from any thread."""
    _say(f"{sentence}: {_State.advice[0]()}")
    os._exit(status)


def _numbers() -> list[signal.Signals]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    if os.getpid() != _State.pid:
        _stop_worker(number)
        return
    if _State.stopping or not _State.speaks:  # the others of a run write nothing
        os._exit(128 + number)
    _State.stopping = True
    timer = threading.Timer(SECONDS, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
    _say(f"stopped by {signal.Signals(number).name}: {_State.advice[0]()}")
    raise SystemExit(128 + number)


def _stop_worker(number: int) -> None:
    """Act in a forked worker: the process that forked it ends it, by SIGTERM."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _say(sentence: str) -> None:
    """Write to the standard error itself: its buffer may be in use where the signal came."""
    with suppress(OSError):  # nobody reads it
        write_all(2, f"qat: {sentence}\n".encode("utf-8", "backslashreplace"))
