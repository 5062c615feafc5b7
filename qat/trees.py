"""Trees of tensors: the tuples, dictionaries and dataclasses that models take and return.

Leaves have a path of keys and numbers, ``("features", 1)``, and a name made of it, ``features.1``.
``None`` is a leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils._pytree import (
    GetAttrKey,
    SequenceKey,
    TreeSpec,
    register_dataclass,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

Path = tuple[str | int, ...]


def leaves(tree: Any) -> list[tuple[Path, Any]]:
    """Return path and value of every leaf, in order."""
    _register_dataclasses(tree)
    return [(tuple(map(_key, path)), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Return the values of all leaves in order, and what ``unflatten`` needs."""
    _register_dataclasses(tree)
    return tree_flatten(tree)


def unflatten(values: Iterable[Any], spec: TreeSpec) -> Any:
    """Undo ``flatten``."""
    return tree_unflatten(values, spec)


def build(values: Mapping[Path, Any]) -> Any:
    """Return a tree of dictionaries and tuples with these leaves.

    Args:
        values: Path to leaf; numbers in a path are places in a tuple.
    """
    if () in values:
        return values[()]
    inner: dict[str | int, dict[Path, Any]] = {}
    for (key, *rest), value in values.items():
        inner.setdefault(key, {})[tuple(rest)] = value
    built = {key: build(part) for key, part in inner.items()}
    is_sequence = all(isinstance(key, int) for key in built)
    return tuple(built.values()) if is_sequence else built


def name_of(path: Path) -> str:
    """Return the name of a leaf: ``features.1``."""
    return ".".join(map(str, path))


def is_plain(value: Any) -> bool:
    """Whether a leaf is a number, a text or None, which any file can hold."""
    return value is None or type(value) in (bool, int, float, str)


def _key(key: Any) -> str | int:
    if isinstance(key, SequenceKey):
        return key.idx
    return key.name if isinstance(key, GetAttrKey) else str(key.key)


def _register_dataclasses(tree: Any) -> None:
    """Let PyTorch look into the dataclasses of a tree; it knows those that were registered.

    One with a field that its constructor does not take could not be made again, and is a leaf.
    """
    while True:
        kinds = {type(leaf) for leaf in tree_flatten(tree)[0] if is_dataclass(type(leaf))}
        made_of_fields = [kind for kind in kinds if all(f.init for f in fields(kind))]
        if not made_of_fields:
            return
        for kind in made_of_fields:
            register_dataclass(kind)
