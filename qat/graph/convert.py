"""Conversion: a trained model in its fold stage becomes a model of integers, a new object.

Weights and biases are integer buffers behind a dequantize; activations pass a quantize and a
dequantize; batch-norms are gone; a ReLU in front of a quantize has become its lowest code; a
quantize is repeated where its codes are moved. What the converted model computes is what the fold
stage computes.
"""

from __future__ import annotations

import operator
from collections import Counter
from copy import deepcopy
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from qat.batch_norm import Stage, StagedBatchNorm
from qat.codecs import ActivationCodec, Lookup, make_codec
from qat.errors import ExportError
from qat.fake_quant import FakeQuant
from qat.graph.captured import Captured
from qat.graph.data_arguments import data_arguments
from qat.graph.dataflow import find_data, written_by
from qat.graph.op_names import moves_codes, op_name
from qat.graph.ops import OPS, UNCHANGED, Op
from qat.integer_layers import ChannelAffine, convert_layer
from qat.layers import QuantizedLayer, quantized_layers

_CLIPS = ("relu", "relu6")


def convert(captured: Captured) -> fx.GraphModule:
    """Return the integer model of ``captured``, which stays trainable as it is.

    Args:
        captured: A model in its fold stage with every quantizer on.

    Returns:
        Integers and a graph that takes and returns tensors in a row; ``IntegerRun`` calls it like
        the model.

    Raises:
        ExportError: If a site does not quantize yet or a layer is not folded.
    """
    _check_ready(captured)
    twin = deepcopy(captured).eval().requires_grad_(False)
    graph = twin.graphs["eval"]
    for module in list(twin.modules()):
        if isinstance(module, QuantizedLayer):
            convert_layer(module)
    sites = {name: m for name, m in twin.named_modules() if isinstance(m, FakeQuant)}
    codecs = {name: make_codec(site) for name, site in sites.items()}
    for name, codec in codecs.items():
        twin.set_submodule(name, codec)
    _look_up(twin, graph, sites)
    modules: dict[str, nn.Module] = dict(twin.named_modules())
    _convert_batch_norms(twin, graph, modules)
    _absorb_clips(twin, graph, modules)
    _repeat_quantizes(graph, modules, {c.site: n for n, c in codecs.items()})
    _merge_quantizes(graph, modules)
    converted = fx.GraphModule(twin, graph, class_name="IntegerModel")
    converted.graph.eliminate_dead_code(
        lambda node: node.is_impure() or written_by(node, modules) is not None
    )
    converted.recompile()
    converted.meta |= {"signature": captured.signature, "outputs": captured.outputs["eval"]}
    return converted


def _check_ready(captured: Captured) -> None:
    waiting = [n for n, layer in quantized_layers(captured) if not layer.folded]
    waiting += [m.site for m in captured.modules() if isinstance(m, FakeQuant) and not m.active]
    if waiting:
        raise ExportError(
            f"expected a model in its fold stage with every quantizer on, got {len(waiting)} sites "
            f"that are not, first '{waiting[0]}': calibrate, quantize and fold before converting."
        )


def _look_up(twin: Captured, graph: fx.Graph, sites: dict[str, FakeQuant]) -> None:
    """Put tables in front of the quantizes whose codes are not rounded quotients."""
    found = {name: Lookup.of(site) for name, site in sites.items()}
    lookups = {name: lookup for name, lookup in found.items() if lookup is not None}
    for name, lookup in lookups.items():
        twin.set_submodule(f"{name}_lookup", lookup)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in lookups:
            with graph.inserting_before(node):
                moved = graph.create_node("call_module", f"{node.target}_lookup", node.args)
            node.args = (moved,)


def _convert_batch_norms(twin: Captured, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, StagedBatchNorm) and module.stage is Stage.FOLDED:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif isinstance(module, StagedBatchNorm):
            modules[str(node.target)] = ChannelAffine.of(module)
            twin.set_submodule(str(node.target), modules[str(node.target)])


def _absorb_clips(twin: Captured, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Turn ReLUs that only feed one quantize into that quantize's lowest and highest code."""
    calls = [n for n in graph.nodes if _codec(n, modules)]
    number = Counter(n.target for n in calls)
    for node in calls:
        source = node.all_input_nodes[0]
        name = op_name(source, modules)
        if name not in _CLIPS or len(source.users) != 1:
            continue
        codec = _codec(node, modules)
        assert codec is not None
        if number[node.target] > 1:  # others that share its scale are not clipped
            node.target = f"{node.target}_{name}"
            codec = deepcopy(codec)
            twin.set_submodule(node.target, codec)
            modules[node.target] = codec
        codec.clip(0.0, OPS[name].upper)
        source.replace_all_uses_with(source.all_input_nodes[0])
        graph.erase_node(source)


def _repeat_quantizes(
    graph: fx.Graph, modules: dict[str, nn.Module], codecs: dict[str, str]
) -> None:
    """Quantize once more, to the same codes, what was moved between a quantize and its reader.

    Runtimes form an integer operator only where a quantize stands right in front of it.
    """
    origin: dict[fx.Node, str | None] = {}
    ops = {node: op_name(node, modules) for node in graph.nodes}
    aliased = find_data(ops, modules, ops).aliased()
    for node, name in ops.items():
        origin[node] = site = _origin(node, name, modules, origin)
        if node in aliased:  # another quantize would copy what is still to be written into
            continue
        if site in codecs and moves_codes(node, name) and _wants_quantize(node, name, modules):
            with graph.inserting_after(node):
                again = graph.create_node("call_module", codecs[site], (node,))
            node.replace_all_uses_with(
                again, delete_user_cb=lambda user, new=again: user is not new
            )
            origin[again] = site


def _merge_quantizes(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Quantize once what is moved alike in several places: exporters merge that, too."""
    same: dict[fx.Node, str] = {}
    first: dict[str, fx.Node] = {}
    if any(node.target is operator.setitem for node in graph.nodes):
        return  # what is moved may change in between
    for node in list(graph.nodes):
        codec = _codec(node, modules)
        args: Any = map_arg((node.args, node.kwargs), same.__getitem__)
        what = node.target if codec is not None else modules.get(str(node.target), node.target)
        is_moved = codec is not None or moves_codes(node, op_name(node, modules))
        known = first.setdefault(f"{what}{args}" if is_moved else node.name, node)
        same[node] = known.name
        if codec is not None and known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


def _origin(
    node: fx.Node, name: str, modules: dict[str, nn.Module], origin: dict[fx.Node, str | None]
) -> str | None:
    """Return the one site whose codes ``node`` holds, right behind its quantize or moved."""
    codec = _codec(node, modules)
    if codec is not None:
        return codec.site
    if not moves_codes(node, name):
        return None
    data = data_arguments(node, name)
    sources = [n for n in data if origin[n] or n.meta.get("shape") is not None]
    found = {origin[n] for n in sources}
    return found.pop() if len(found) == 1 else None


def _wants_quantize(node: fx.Node, name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether what ``node`` moved is read as codes; a concatenation itself is an operator."""
    shape = node.meta.get("shape")
    if name in UNCHANGED or shape is None or 0 in shape:  # runtimes drop what is empty
        return False
    readers = [OPS.get(op_name(user, modules), Op()) for user in node.users]
    return OPS[name].joins or any(r.reads_codes or r.elementwise or r.joins for r in readers)


def _codec(node: fx.Node, modules: dict[str, nn.Module]) -> ActivationCodec | None:
    module = modules[str(node.target)] if node.op == "call_module" else None
    return module if isinstance(module, ActivationCodec) else None
