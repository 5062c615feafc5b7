"""Keys by their dotted names, and those that a wrong one may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qat.errors import ConfigError


def flatten(config: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every key of ``config``, groups in front of what is in them."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")


def no_key(key: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a key that does not exist, with the names that are closest.

    Args:
        key: Its dotted name.
        known: The dotted names that exist.
    """
    group, _, last = key.rpartition(".")
    names = [name for name in dict.fromkeys(known) if "_target_" not in name]
    root = key.partition(".")[0]
    same = [name for name in names if name.rpartition(".")[2] == last and name != key]
    same = [name for name in same if name.partition(".")[0] == root or not group]
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == group}
    close = [beside[word] for word in difflib.get_close_matches(last, beside, n=3)]
    near = (close or same or difflib.get_close_matches(key, names, n=3, cutoff=0.75))[:3]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"No key {key}. {hint}--help lists groups and keys.")
