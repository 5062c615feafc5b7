"""A converted model's graph as JSON, and a model of that form.

The form has one row for each node (name, kind, target, arguments, named arguments, and the shape
of a batch of two where it is a float tensor) and one entry for each module. Operations are named,
as ``allowed.py`` lists them, and never carried as code.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from qat.errors import ExportError
from qat.export.allowed import ATTRIBUTES, FUNCTION_NAMES, FUNCTIONS, METHODS
from qat.export.arguments import decode, encode
from qat.export.module_form import build_module, describe_module
from qat.export.packed_graph import PackedGraph

_PATH = re.compile(r"[\w/-]+(\.[\w/-]+)*", re.ASCII)


class UnnamedOperationError(ExportError):
    """An operation that no packed file may name.

    Attributes:
        node: Where it stands.
    """

    node: fx.Node


def describe_graph(model: fx.GraphModule) -> dict[str, Any]:
    """Return the graph of a converted model as JSON, without its tensors.

    Raises:
        UnnamedOperationError: If an operation is none that a file may name; says which, and where.
    """
    rows: list[Any] = []
    names = called_modules(model)
    modules: dict[str, Any] = {}
    for node in model.graph.nodes:
        try:
            target = _encode_target(node)
            if node.op == "call_module":
                module = model.get_submodule(target)
                target = names[module]
                modules[target] = describe_module(module)
            rows.append([node.name, node.op, target, *_encode_arguments(node)])
        except ExportError as error:
            refused = UnnamedOperationError(
                f"expected operations of torch at every node of the graph, got {error} at "
                f"'{_place(node)}': write it with torch.nn and torch.nn.functional, or use "
                "model.onnx."
            )
            refused.node = node
            raise refused from error
    return {"nodes": rows, "modules": modules}


def called_modules(model: fx.GraphModule) -> dict[nn.Module, str]:
    """Return the modules that the graph calls, each with the one name that a file gives it."""
    called = {model.get_submodule(str(n.target)) for n in _nodes(model, "call_module")}
    return {module: name for name, module in model.named_modules() if module in called}


def _nodes(model: fx.GraphModule, op: str) -> list[fx.Node]:
    return [node for node in model.graph.nodes if node.op == op]


def _encode_arguments(node: fx.Node) -> list[Any]:
    shape = node.meta.get("shape")
    named = {key: encode(value) for key, value in node.kwargs.items()}
    return [[encode(a) for a in node.args], named, None if shape is None else [*shape]]


def _place(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def _encode_target(node: fx.Node) -> str:
    if node.op == "call_function":
        if node.target not in FUNCTION_NAMES:
            raise ExportError(f"a function {getattr(node.target, '__name__', node.target)}")
        return FUNCTION_NAMES[node.target]  # pyright: ignore[reportArgumentType]
    if node.op == "call_method" and node.target not in METHODS:
        raise ExportError(f"a method {node.target}")
    return str(node.target)


def graph_tensors(model: fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that the graph itself reads, by name."""
    names = {str(n.target) for n in _nodes(model, "get_attr")}
    return {name: _attribute(model, name).detach() for name in sorted(names)}


def _attribute(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def build_graph(
    form: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Mapping[str, Any]
) -> PackedGraph:
    """Return the model that ``describe_graph`` described, in eval mode.

    Args:
        form: What ``describe_graph`` returned.
        tensors: The tensors of the file, weights as codes of their own shape.
        weights: What the file's header says of its weights.

    Raises:
        ExportError: If the form names what it may not, or tensors are missing or do not fit.
    """
    graph, constants = fx.Graph(), {}
    modules = {
        _check_path(name): build_module(name, described, tensors, weights)
        for name, described in form["modules"].items()
    }
    nodes: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs, shape in form["nodes"]:
        found = _decode_target(op, target, modules)
        if op == "get_attr":
            constants[target] = _constant(target, tensors)
        plain = tuple(decode(args, nodes)), {k: decode(v, nodes) for k, v in kwargs.items()}
        _check_call(found, *plain)
        nodes[name] = graph.create_node(op, found, *plain, _check_new(name, nodes))
        nodes[name].meta["shape"] = None if shape is None else tuple(map(int, shape))
    _check_whole(form["nodes"])
    return PackedGraph(graph, modules, constants)


def _check_new(name: Any, nodes: Mapping[str, fx.Node]) -> str:
    if _check_name(name) in nodes:
        raise ExportError(f"two nodes of name '{name}'")
    return name


def _check_whole(rows: list[Any]) -> None:
    """Refuse a graph without an input, or with another end than one output."""
    ops = [row[1] for row in rows]
    if ops.count("output") != 1 or ops[-1] != "output" or "placeholder" not in ops:
        raise ExportError("a graph without an input, or with another end than one output")


def _constant(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if path not in tensors:
        raise ExportError(f"no tensor '{path}'")
    return tensors[path]


def _decode_target(op: str, target: Any, modules: Mapping[str, Any]) -> Any:
    if op == "call_function" and target in FUNCTIONS:
        return FUNCTIONS[target]
    is_known = {
        "call_method": target in METHODS,
        "call_module": target in modules,
        "get_attr": isinstance(target, str) and _PATH.fullmatch(target) is not None,
        "placeholder": isinstance(target, str) and _is_name(target),
        "output": target == "output",
    }
    if not is_known.get(op, False):
        raise ExportError(f"an operation {op} {target!r}")
    return target


def _check_call(target: Any, args: Any, kwargs: Any) -> None:
    """Refuse arguments that would be more than values."""
    if target is getattr and not (len(args) == 2 and not kwargs and args[1] in ATTRIBUTES):
        raise ExportError(f"an attribute {args[1:]!r}")
    for name in kwargs:
        _check_name(name)


def _is_name(text: str) -> bool:
    return text.isidentifier() and text.isascii() and not keyword.iskeyword(text)


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not _is_name(name):
        raise ExportError(f"a name {name!r}")
    return name


def _check_path(path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ExportError(f"a name {path!r}")
    return path
