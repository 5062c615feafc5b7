"""Which arguments of a call are data: values that the result is computed from.

The others lend a size, a dtype or a device, or choose what is taken: an index, a mask, a condition.
The row of an operation (``ops.py``) says how many of its leading arguments are data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from qat.graph.ops import OPS, UNKNOWN

_POSITIONS = {
    **dict.fromkeys(("input", "self", "tensors", "query"), 0),
    **dict.fromkeys(("other", "mat2", "weight", "key"), 1),
    **dict.fromkeys(("bias", "value"), 2),
}
"""Where an argument stands that may also be given by name; others stand where they are written."""


def change_arguments(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    data: Callable[[Any], Any],
    rest: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """Return the arguments of a call, those that are data changed by one function.

    Args:
        name: The operation.
        args: By position; values or nodes, in tuples and lists, too.
        kwargs: By name.
        data: What to make of a value in the arguments that are data.
        rest: What to make of a value in the others.
    """
    count = OPS.get(name, UNKNOWN).data

    def change(position: int, value: Any) -> Any:
        return map_aggregate(value, data if position < count else rest)

    named = {
        key: change(_POSITIONS.get(key, len(args) + i), value)
        for i, (key, value) in enumerate(kwargs.items())
    }
    return tuple(change(i, value) for i, value in enumerate(args)), named


def data_arguments(node: fx.Node, name: str) -> list[fx.Node]:
    """Return the nodes among the arguments of ``node`` that are data, each once, in order.

    Args:
        node: A node of a captured graph.
        name: The name of its operation.
    """
    found: dict[fx.Node, None] = {}

    def note(value: Any) -> Any:
        if isinstance(value, fx.Node):
            found[value] = None
        return value

    change_arguments(name, node.args, node.kwargs, note, lambda value: value)
    return list(found)
