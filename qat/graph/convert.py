"""Conversion: a trained model in its fold stage becomes a model of integers, a new object.

Weights and biases are integer buffers behind a dequantize; activations pass a quantize and a
dequantize; batch-norms are gone; a ReLU in front of a quantize has become its lowest code. What
the converted model computes is what the fold stage computes.
"""

from __future__ import annotations

from copy import deepcopy

from torch import fx, nn

from qat.batch_norm import Stage, StagedBatchNorm, restore_batch_norm
from qat.errors import ExportError
from qat.fake_quant import FakeQuant
from qat.graph.captured import Captured
from qat.graph.op_names import op_name
from qat.graph.ops import OPS
from qat.integer_layers import ActivationCodec, convert_layer, make_codec
from qat.layers import QuantizedLayer, quantized_layers

_CLIPS = ("relu", "relu6")


def convert(captured: Captured) -> fx.GraphModule:
    """Return the integer model of ``captured``, which stays trainable as it is.

    Args:
        captured: A model in its fold stage with every quantizer on.

    Raises:
        ExportError: If a site does not quantize yet or a layer is not folded.
    """
    _check_ready(captured)
    twin = deepcopy(captured).eval().requires_grad_(False)
    graph = twin.graphs["eval"]
    for module in list(twin.modules()):
        if isinstance(module, QuantizedLayer):
            convert_layer(module)
    codecs = {
        name: make_codec(module)
        for name, module in twin.named_modules()
        if isinstance(module, FakeQuant)
    }
    for name, codec in codecs.items():
        twin.set_submodule(name, codec)
    modules: dict[str, nn.Module] = dict(twin.named_modules())
    _drop_folded(graph, modules)
    _absorb_clips(graph, modules)
    return fx.GraphModule(twin, graph, class_name="IntegerModel")


def _check_ready(captured: Captured) -> None:
    waiting = [n for n, layer in quantized_layers(captured) if not layer.folded]
    waiting += [m.site for m in captured.modules() if isinstance(m, FakeQuant) and not m.active]
    if waiting:
        raise ExportError(
            f"expected a model in its fold stage with every quantizer on, got {len(waiting)} sites "
            f"that are not, first '{waiting[0]}': calibrate, quantize and fold before converting."
        )


def _drop_folded(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, StagedBatchNorm) and module.stage is Stage.FOLDED:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif isinstance(module, StagedBatchNorm):
            restore_batch_norm(module)  # stays, as plain eval-mode arithmetic


def _absorb_clips(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Turn ReLUs that only feed one quantize into that quantize's lowest and highest code."""
    calls = [n for n in graph.nodes if n.op == "call_module" and _is_codec(n, modules)]
    for node in calls:
        source = node.all_input_nodes[0]
        alone = sum(n.target == node.target for n in calls) == 1 and len(source.users) == 1
        if alone and op_name(source, modules) in _CLIPS:
            codec = modules[str(node.target)]
            assert isinstance(codec, ActivationCodec)
            codec.clip(0.0, OPS[op_name(source, modules)].upper)
            source.replace_all_uses_with(source.all_input_nodes[0])
            graph.erase_node(source)


def _is_codec(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return isinstance(modules[str(node.target)], ActivationCodec)
