"""A converted model in the dialect that PyTorch's own integer back ends read.

Sites become a quantize and a dequantize of ``torch.ops.quantized_decomposed``, weights a dequantize
of int8 constants, layers plain functions between them. A back end forms integer kernels of that;
what has no form there is left as it is, in float. ``float_layers`` says which, and why.

The operators belong to the package that brings the back end (torchao, executorch), which has to be
imported first.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat.codecs import ActivationCodec, DynamicCodec, DynamicTensorCodec
from qat.integer_layers import IntegerLayer
from qat.subclass import plain_twin

_MOVED = 128
_PASSES = (nn.Identity, nn.Dropout, nn.Flatten)


def float_layers(model: fx.GraphModule, *, codes_out: bool = False) -> dict[str, str]:
    """Return why layers have no integer form in this dialect, by name, in the order of the graph.

    An embedding looks rows up and computes nothing, so none is listed.

    Args:
        model: What ``qat.graph.convert`` returned, or a file of it.
        codes_out: Integer layers write codes only, so what they compute has to be quantized.
    """
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for node in model.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if _is_layer(layer):
            reason = _weight_reason(layer) or _input_reason(node.args[0], modules)
            if codes_out and not reason:
                reason = _output_reason(node, modules)
            if reason:
                found[str(node.target)] = reason
    return found


def _is_layer(module: nn.Module | None) -> TypeGuard[IntegerLayer]:
    return isinstance(module, IntegerLayer) and not isinstance(module, nn.Embedding)


def _weight_reason(layer: IntegerLayer) -> str:
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"there is no integer {type(layer).__name__.removeprefix('Quantized')}"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={layer.padding_mode}"
    if layer.weight_codes.dtype != torch.int8:
        return f"weights of {layer.spec.bits} bits, stored as {_name(layer.weight_codes.dtype)}"
    if bool(layer.weight_zero_point.any()):
        return "weights with another zero point than 0"
    if layer.block or (layer.weight_scale.ndim and layer.axis):
        return "several weight scales inside one output channel"
    return ""


def _input_reason(source: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Return why what a layer reads is not 8-bit codes, looking through what moves values."""
    while source.all_input_nodes:
        module = modules.get(str(source.target)) if source.op == "call_module" else None
        if isinstance(module, ActivationCodec):
            bits = module.spec.bits
            return "" if bits <= 8 else f"an input of {bits} bits at site '{module.site}'"
        if isinstance(module, DynamicCodec | DynamicTensorCodec):
            return f"an input whose scale is found at run time, at site '{module.site}'"
        if module is not None and not isinstance(module, _PASSES):
            return "an input that is not quantized"
        source = source.all_input_nodes[0]
    return "an input that is not quantized"


def _output_reason(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    readers = [modules.get(str(user.target)) for user in node.users]
    if len(readers) == 1 and isinstance(readers[0], ActivationCodec) and readers[0].spec.bits <= 8:
        return ""
    return "a result that is not quantized to 8 bits, once, right behind it"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decompose(
    model: fx.GraphModule, *, signed: bool = False, codes_out: bool = False
) -> fx.GraphModule:
    """Return a converted model in the dialect, a new object.

    Args:
        model: What ``qat.graph.convert`` returned, or a file of it.
        signed: Store activations as int8, 128 below the codes of the file, and not as uint8.
        codes_out: As for ``float_layers``.
    """
    twin = deepcopy(model)
    modules, in_float = dict(twin.named_modules()), float_layers(twin, codes_out=codes_out)
    for node in list(twin.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        with twin.graph.inserting_before(node):
            if isinstance(module, ActivationCodec) and module.spec.bits <= 8:
                new = _site(twin.graph, node.args[0], module, signed=signed)
            elif _is_layer(module) and node.target not in in_float:
                new = _layer(twin, node, module)
            else:
                continue
        node.replace_all_uses_with(new)
        twin.graph.erase_node(node)
    for name, module in modules.items():
        if isinstance(module, IntegerLayer):
            twin.set_submodule(name, _in_float(module))
    return fx.GraphModule(twin, twin.graph, class_name="DecomposedModel").eval()


def _in_float(layer: Any) -> nn.Module:
    """Return a layer of the original class with the real values of weight and bias."""
    values = {"weight": layer.weight, "bias": layer.bias}
    known = {k: None if v is None else nn.Parameter(v, False) for k, v in values.items()}
    return plain_twin(layer, **known)


def _site(graph: fx.Graph, x: Any, codec: ActivationCodec, *, signed: bool) -> fx.Node:
    """Insert quantize and dequantize; a narrower range is clipped in front, on grid points."""
    ops = torch.ops.quantized_decomposed
    scale, zero_point = codec.scale.item(), int(codec.zero_point.item())
    if (codec.qmin, codec.qmax) != (0, 255):
        ends = [(end - zero_point) * scale for end in (codec.qmin, codec.qmax)]
        x = graph.call_function(F.hardtanh, (x, *ends))
    moved, kind = (_MOVED, torch.int8) if signed else (0, torch.uint8)
    form = (scale, zero_point - moved, -moved, 255 - moved, kind)
    codes = graph.call_function(ops.quantize_per_tensor.default, (x, *form))
    return graph.call_function(ops.dequantize_per_tensor.default, (codes, *form))


def _layer(model: fx.GraphModule, node: fx.Node, layer: Any) -> fx.Node:
    graph, key = model.graph, str(node.target)
    count = len(layer.weight_codes)
    constants: dict[str, Tensor | None] = {
        "codes": layer.weight_codes,
        "scale": layer.weight_scale.expand(count).contiguous(),
        "zero_point": layer.weight_zero_point.long().expand(count).contiguous(),
        "bias": layer.bias,
    }
    codes, scale, zero_point, bias = (
        None if value is None else _constant(model, f"{key}.{name}", value)
        for name, value in constants.items()
    )
    dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
    form = (codes, scale, zero_point, 0, -_MOVED, _MOVED - 1, torch.int8)
    weight = graph.call_function(dequantize, form)
    if isinstance(layer, nn.Linear):
        return graph.call_function(F.linear, (node.args[0], weight, bias))
    place = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return graph.call_function(F.conv2d, (node.args[0], weight, bias, *place))


def _constant(model: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Register a buffer under a flat name, once, and return a node that reads it."""
    key = "constant_" + name.replace(".", "_").replace("/", "_")
    if key not in model._buffers:
        model.register_buffer(key, value.detach())
    return model.graph.get_attr(key)
