"""Where the state dicts of a checkpoint lie: files of other tools wrap them in dictionaries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import CheckpointError, printable

USUAL = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "module",
    "student",
    "net_state_dict",
    "backbone",
    "encoder",
)
"""Keys and prefixes under which tools put the weights that they train, the best known first."""
AVERAGE = re.compile(
    r"(^|_)(ema|swa|avg|averaged?|teacher|momentum|shadow|polyak|target)(_|\d|$)|_k$"
)
"""Names of copies: averages of the weights, and models that teach others."""
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
DEEPEST = 8  # dictionaries inside one another
SHOWN = 5

State = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Tensors by name, and the keys of the file under which they lie, from the outside in."""

    keys: tuple[str, ...]
    state: State


def find_places(content: Any, path: str | Path) -> list[Place]:
    """Return all dictionaries of a file that hold tensors by name, outer ones first.

    Args:
        content: What the file held.
        path: The file, for the message.

    Raises:
        CheckpointError: If there is none.
    """
    found = [Place(keys, state) for keys, inner in _dicts(content) if (state := _tensors(inner))]
    if not found:
        raise CheckpointError(
            f"expected tensors by name in {printable(path)}, bare or under a key such as "
            f"{', '.join(USUAL[:SHOWN])}, but it holds {_described(content)}; save "
            f"model.state_dict()."
        )
    return found


def order(keys: tuple[str, ...]) -> tuple[bool, int, list[int]]:
    """Return what sorts places: weights before averages of them, usual names before others."""
    words = list(map(snake, keys))
    known = [USUAL.index(word) if word in USUAL else len(USUAL) for word in words]
    is_average = any(AVERAGE.search(word) for word in words)
    return is_average, known.count(len(USUAL)), known


def snake(word: str) -> str:
    """Return a name in the way of Python's variables: ``modelEma`` is ``model_ema``."""
    return CAMEL.sub("_", word).lower()


def _dicts(content: Any) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Yield every dictionary once, with the keys that lead to it; a file can hold circles."""
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for _ in range(DEEPEST + 1):
        inner = []
        for keys, value in level:
            if isinstance(value, dict | list) and id(value) not in seen:
                seen.add(id(value))
                plain = _plain(value) if isinstance(value, dict) else dict(enumerate(value))
                if isinstance(value, dict):
                    yield keys, plain
                inner += [((*keys, str(k)), v) for k, v in plain.items() if _is_key(k)]
        level = inner


def _is_key(key: Any) -> bool:
    return isinstance(key, str | int)


def _plain(content: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict without the attributes that a file can give to an OrderedDict."""
    return dict(dict.items(content))


def _tensors(content: dict[Any, Any]) -> State:
    found = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {name: Tensor.detach(tensor) for name, tensor in found.items()}


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    keys = list(_plain(content))
    return f"a dict with {', '.join(map(_named, keys[:SHOWN])) or 'nothing in it'}"


def _named(key: Any) -> str:
    """Return a key for a message; anything can be a key, and only text is sure to be short."""
    return printable(key, 60) if isinstance(key, str | int | float) else type(key).__name__
