"""Kinds of values: what an argument may be, in words and as a test, and the error if it is not."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qat.errors import ConfigError, QatError

LONGEST = 80
"""Characters of a value that a message shows."""
LONGEST_NAME = 200
"""Bytes; file systems take 255, and names of files get endings."""
LARGEST = 2**63 - 1
"""The largest whole number that libraries in C can count to."""


@dataclass(frozen=True)
class Kind:
    """What a value may be; ``a | b`` takes what either takes.

    Args:
        wanted: The words that complete "expected KEY to be ...".
        fits: Whether a value is of this kind.
        words: Words that it takes, to name the closest where another one came.
    """

    wanted: str
    fits: Callable[[object], bool]
    words: tuple[str, ...] = ()

    def __or__(self, other: Kind) -> Kind:
        parts = dict.fromkeys([*self.wanted.split(" or "), *other.wanted.split(" or ")])
        return Kind(
            " or ".join(parts),
            lambda value: self.fits(value) or other.fits(value),
            (*self.words, *other.words),
        )


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number; true and false are none."""
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def is_text(value: object) -> bool:
    """Whether ``value`` is a text of printable characters."""
    return isinstance(value, str) and value.isprintable()


def whole(low: int | None = None, high: int | None = None) -> Kind:
    """Return the kind of whole numbers from ``low`` to ``high``, both included."""

    def fits(value: object) -> bool:
        return type(value) is int and abs(value) <= LARGEST and _between(value, low, high)

    return Kind(f"a whole number{_bounds(low, high)}", fits)


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Kind:
    """Return the kind of finite numbers from ``low`` to ``high``, or ``above`` and ``below``."""

    def fits(value: object) -> bool:
        if not isinstance(value, int | float) or not is_number(value):
            return False
        is_open = (above is None or value > above) and (below is None or value < below)
        return is_open and _between(value, low, high)

    limits = [_bounds(low, high)] if (low, high) != (None, None) else []
    limits += [f" above {above:g}"] if above is not None else []
    limits += [f" below {below:g}"] if below is not None else []
    return Kind("a finite number" + " and".join(limits), fits)


def words(*allowed: str) -> Kind:
    """Return the kind of a few words."""
    return Kind(
        " or ".join(allowed), lambda value: isinstance(value, str) and value in allowed, allowed
    )


def each(kind: Kind, least: int = 0, most: int | None = None) -> Kind:
    """Return the kind of lists of ``least`` to ``most`` values of ``kind``."""

    def fits(value: object) -> bool:
        is_list = isinstance(value, list | tuple)
        return is_list and _between(len(value), least, most) and all(map(kind.fits, value))

    count = f" {least}" if least == most else ""
    return Kind(f"a list of{count} values that are {kind.wanted}", fits)


def table(key: Kind, kind: Kind) -> Kind:
    """Return the kind of mappings from values of ``key`` to values of ``kind``."""

    def fits(value: object) -> bool:
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(key.fits(k) and kind.fits(v) for k, v in pairs)

    return Kind(f"a mapping from {key.wanted} to {kind.wanted}", fits)


def require(key: str, value: object, kind: Kind, error: type[QatError] = ConfigError) -> None:
    """Refuse a value that is not of a kind.

    Args:
        key: What the user calls it, such as ``schedule.epochs``.
        value: What came.
        kind: What is expected.
        error: What to raise.

    Raises:
        QatError: The given ``error``, if it is not.
    """
    if not kind.fits(value):
        near = difflib.get_close_matches(str(value), kind.words, n=3)
        remedy = f"did you mean {', '.join(near)}?" if near else "correct it."
        if type(value) is int and abs(value) > LARGEST:
            remedy = f"whole numbers end at {LARGEST}, so lower it."
        raise error(f"expected {key} to be {kind.wanted}, got {show(value)}: {remedy}")


def require_all(
    prefix: str,
    values: Mapping[str, object],
    kinds: Mapping[str, Kind],
    error: type[QatError] = ConfigError,
) -> None:
    """Refuse the first of several values that is not of its kind.

    Args:
        prefix: What stands in front of their names, such as ``schedule.``.
        values: Name to value; others than those of ``kinds`` are left alone.
        kinds: Name to kind.
        error: What to raise.

    Raises:
        QatError: The given ``error``, if there is one.
    """
    for name, kind in kinds.items():
        require(prefix + name, values[name], kind, error)


def show(value: object) -> str:
    """Return a value as a user types it, on one line, cut where it is long."""
    known = {None: "null", True: "true", False: "false"}
    is_word = value is None or isinstance(value, bool)
    text = known[value] if is_word else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _between(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of at least {low}" if low is not None else f" of at most {high}" if high else ""


def _is_folder_name(value: object) -> bool:
    if not WORD.fits(value):
        return False
    text = str(value)
    is_short = len(text.encode("utf-8", "replace")) <= LONGEST_NAME
    return is_short and not re.search(r"[/\\:*?\"<>|]|^[.\s]|[.\s]$", text)


NULL = Kind("null", lambda value: value is None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool), ("true", "false"))
TEXT = Kind("a text", is_text)
WORD = Kind("a word", lambda value: is_text(value) and bool(str(value).strip()))
FILE = Kind("a path", lambda value: isinstance(value, str | Path) and WORD.fits(str(value)))
FRACTION = number(0, 1)
FOLDER_NAME = Kind("a folder's name without slashes", _is_folder_name)
