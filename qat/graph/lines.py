"""Lines of the user's code: where an error arose, and where an operation is written."""

from __future__ import annotations

import linecache
import sys
import traceback
from pathlib import Path
from types import FrameType

import torch

_HERE = Path(__file__).parent
_OURS = (str(Path(torch.__file__).parent), str(_HERE), str(_HERE.parent / "calls.py"))


def line_of_error(error: BaseException) -> str:
    """Return ``file:line (code)`` of the user's code that raised ``error``."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if not f.filename.startswith(_OURS)]
    frame = (mine or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


def current_line(root: str) -> str | None:
    """Return ``file:line (code)`` of the user's code that is running; ``None`` where it is torch's.

    Args:
        root: Name of the function that called the user's code: frames above are somebody else's.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != root:
        file, number = frame.f_code.co_filename, frame.f_lineno
        if not file.startswith(_OURS):
            return f"{file}:{number} ({linecache.getline(file, number).strip()})"
        frame = frame.f_back
    return None


def current_lines() -> tuple[int, ...]:
    """Return the numbers of all lines that are running, innermost first."""
    lines, frame = [], sys._getframe(1)
    while frame is not None:
        lines.append(frame.f_lineno)
        frame = frame.f_back
    return tuple(lines)
