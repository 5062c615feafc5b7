"""What torch says of an operation without an ONNX form, as one sentence that names its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import fx

from qat.errors import ExportError, printable

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def without_form(error: BaseException, model: fx.GraphModule) -> ExportError:
    """Return the error to raise where ``torch.onnx.export`` failed.

    Args:
        error: What it raised.
        model: The converted model.
    """
    translated = next(_failed_nodes(error), None)
    node = None if translated is None else _origin(translated, model)
    cause = _first_cause(error)
    said = printable(" ".join(_COLOURS.sub("", str(cause)).split()), 300)
    what = "" if translated is None else f"none for {_operation(translated)}"
    where = "" if node is None else f" at {place(node)}"
    return ExportError(
        f"expected every operation of the model to have an ONNX form, got {what or 'an error'}"
        f"{where} ({type(cause).__name__}: {said}): write it with other operations of torch, or "
        "train with target=simulation, which writes no file."
    )


def place(node: fx.Node) -> str:
    """Return the name of an operation or module, and the user's line that calls it if known."""
    name = f"'{node.target if node.op == 'call_module' else node.name}'"
    line = node.meta.get("line")
    return f"{name} in {line}" if line else name


def _operation(node: fx.Node) -> str:
    overload = str(getattr(node.target, "_overloadpacket", node.target))
    return overload.removeprefix("aten.").removeprefix("prims.")


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _failed_nodes(error: BaseException) -> Iterator[fx.Node]:
    """Yield the nodes that were handled when ``error`` rose: torch's messages do not hold them."""
    cause: BaseException | None = error
    while cause is not None:
        trace: Any = cause.__traceback__
        while trace is not None:
            found = [trace.tb_frame.f_locals.get(name) for name in ("node", "n")]
            yield from (node for node in found if isinstance(node, fx.Node))
            trace = trace.tb_next
        cause = cause.__cause__


def _origin(node: fx.Node, model: fx.GraphModule) -> fx.Node | None:
    """Return the node of ``model`` that an exported one comes from."""
    names, sources = [node.name], list(node.meta.get("from_node", ()))
    while sources:
        names = [source.name for source in sources]
        sources = [inner for source in sources for inner in source.from_node]
    nodes = {n.name: n for n in model.graph.nodes}
    return next((nodes[name] for name in names if name in nodes), None)
