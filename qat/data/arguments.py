"""Checks of the values under ``data``, which come from a command line and can be anything."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qat.errors import ConfigError, printable

MOST = 2**31 - 1


def check_whole(key: str, value: Any, low: int, high: int = MOST) -> None:
    """Refuse what is no whole number of a range.

    Args:
        key: Name under ``data``, for the message.
        value: What was given.
        low: Smallest value.
        high: Largest value.

    Raises:
        ConfigError: If ``value`` is not an int from ``low`` to ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        is_large = isinstance(value, int) and value > high
        at_most = f" and at most {high}" if high != MOST or is_large else ""
        raise ConfigError(
            f"expected data.{key} to be a whole number of at least {low}{at_most}, got "
            f"{printable(repr(value))}: correct it."
        )


def check_number(key: str, value: Any, low: float, high: float = math.inf) -> None:
    """Refuse what is no number of a range that is open above.

    Args:
        key: Name under ``data``, for the message.
        value: What was given.
        low: Smallest value.
        high: What it has to be below; infinity by default, which is itself refused, as NaN is.

    Raises:
        ConfigError: If ``value`` is not a number from ``low`` to below ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        raise ConfigError(
            f"expected data.{key} to be at least {low:g} and below {high:g}, got "
            f"{printable(repr(value))}: correct it."
        )


def check_text(key: str, value: Any) -> None:
    """Refuse what is no text, such as a path given as a number or a list.

    Raises:
        ConfigError: If ``value`` is no string or path, or an empty one.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigError(
            f"expected data.{key} to be a text, got {printable(repr(value))}: correct or quote it."
        )


def statistic(key: str, value: Any, channels: int | None = None) -> tuple[float, ...] | None:
    """Return ``mean`` or ``std`` as floats; None stays.

    Args:
        key: "mean" or "std".
        value: What was given.
        channels: How many numbers there have to be; None leaves that open.

    Raises:
        ConfigError: If it is no list of finite numbers, above 0 for "std", or of another
            length.
    """
    if value is None:
        return None
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not is_list or not all(_fits(v, key == "std") for v in value):
        raise ConfigError(
            f"expected data.{key} to be a list of finite numbers{' above 0' * (key == 'std')}, one "
            f"for each channel, got {printable(repr(value))}: correct it."
        )
    if channels is not None and len(value) != channels:
        raise ConfigError(
            f"expected data.{key} to have {channels} values, one for each channel, got "
            f"{printable(repr(list(value)))}: correct it."
        )
    return tuple(float(v) for v in value)


def _fits(value: Any, positive: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (value > 0 or not positive)


def check_device(value: Any) -> None:
    """Refuse what cannot name a device that holds data.

    Raises:
        ConfigError: If ``value`` is neither None nor a device with memory.
    """
    try:
        known = value is None or (
            isinstance(value, str) and torch.device(value).type not in ("meta", "lazy")
        )
    except RuntimeError:
        known = False
    if not known:
        raise ConfigError(
            f"expected data.device to be null or a device such as cuda, got "
            f"{printable(repr(value))}: correct or remove it."
        )
