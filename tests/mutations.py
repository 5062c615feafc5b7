"""Damage that keeps the structure of what it damages: plain values, bytes; seeded."""

import copy
import math
import random
from typing import Any

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0,
    math.nan, math.inf, -math.inf, 1e308, "", "a", "x" * 5000, "../../x", "__class__", "__init__",
    "\0", "\x1b[2J", "=1+1", "a\nb", "ü\udcff", "int8", "float32", "torch.load", "out", "1",
    [], {}, [[]], [0], [1, 2, 3, 4], [[[[[[[[1]]]]]]]], {"": ""}, {"node": "x"}, {"tuple": [1, 2]},
    {"_target_": "torch.utils.collect_env.run", "command": "touch MARK"}, {"dtype": "int64"},
]  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return container and key of everything inside ``tree``."""
    found: list[tuple[Any, Any]] = []
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            found.append((tree, key))
            found += places(tree[key])
    return found


def mutate(tree: Any, rng: random.Random) -> Any:
    """Return a copy of plain values in which one to three things are changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if known := places(tree):
            _change(*rng.choice(known), rng, known)
    return tree


def _change(owner: Any, key: Any, rng: random.Random, known: list[tuple[Any, Any]]) -> None:
    how = rng.choice(["value", "value", "value", "delete", "double", "swap", "number", "key"])
    if how == "delete":
        del owner[key]
    elif how == "double" and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    elif how == "key" and isinstance(owner, dict):
        owner[rng.choice(["", "x", "__class__", "out", "a.b"])] = owner.pop(key)
    elif how == "swap":
        other, place = rng.choice(known)
        if place in (other if isinstance(other, dict) else range(len(other))):
            owner[key] = copy.deepcopy(other[place])
    elif how == "number" and type(owner[key]) in (int, float):
        owner[key] = owner[key] * rng.choice([-1, 2, 1000, 2**40]) + rng.choice([-1, 0, 1])
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with flipped bits, a block of zeros, a part cut out, doubled or exchanged."""
    damaged, size = bytearray(content), len(content)
    start = rng.randrange(size)
    end = min(size, start + rng.choice([1, 8, 64, 1000]))
    how = rng.choice(["flip", "flip", "zero", "cut", "end", "double", "random"])
    if how == "flip":
        damaged[start] ^= 1 << rng.randrange(8)
    elif how == "zero":
        damaged[start:end] = bytes(end - start)
    elif how == "cut":
        del damaged[start:end]
    elif how == "end":
        del damaged[start:]
    elif how == "double":
        damaged[start:start] = damaged[start:end]
    else:
        damaged[start:end] = rng.randbytes(end - start)
    return bytes(damaged)
