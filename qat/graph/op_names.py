"""Names of operations: which modules, functions and methods of torch are the same operation."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat.graph.ops import OPS

MODULES: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
    nn.modules.batchnorm._BatchNorm: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.GroupNorm: "group_norm",
    nn.RMSNorm: "rms_norm",
    nn.ReLU6: "relu6",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Softmax: "softmax",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.MaxPool1d: "max_pool",
    nn.MaxPool2d: "max_pool",
    nn.MaxPool3d: "max_pool",
    nn.AdaptiveMaxPool1d: "max_pool",
    nn.AdaptiveMaxPool2d: "max_pool",
    nn.AdaptiveMaxPool3d: "max_pool",
    nn.AvgPool1d: "average_pool",
    nn.AvgPool2d: "average_pool",
    nn.AvgPool3d: "average_pool",
    nn.AdaptiveAvgPool1d: "average_pool",
    nn.AdaptiveAvgPool2d: "average_pool",
    nn.AdaptiveAvgPool3d: "average_pool",
    nn.Upsample: "interpolate",
    nn.Flatten: "reshape",
    nn.Unflatten: "reshape",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout",
    nn.Dropout3d: "dropout",
    nn.AlphaDropout: "dropout",
    nn.FeatureAlphaDropout: "dropout",
    nn.Identity: "identity",
    nn.ZeroPad2d: "pad",
    nn.PixelShuffle: "reshape",
    nn.PixelUnshuffle: "reshape",
    nn.ChannelShuffle: "reshape",
    nn.Embedding: "embedding",
    nn.MultiheadAttention: "attention",
}

FUNCTIONS: dict[object, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    torch.einsum: "einsum",
    torch.cat: "concat",
    torch.concat: "concat",
    torch.stack: "concat",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    torch.softmax: "softmax",
    F.sigmoid: "sigmoid",
    F.hardsigmoid: "hardsigmoid",
    F.softmax: "softmax",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    torch.max_pool1d: "max_pool",
    torch.max_pool2d: "max_pool",
    F.max_pool1d: "max_pool",
    F.max_pool2d: "max_pool",
    F.max_pool3d: "max_pool",
    F.adaptive_max_pool1d: "max_pool",
    F.adaptive_max_pool2d: "max_pool",
    F.adaptive_max_pool3d: "max_pool",
    torch.amax: "max_pool",
    F.avg_pool1d: "average_pool",
    F.avg_pool2d: "average_pool",
    F.avg_pool3d: "average_pool",
    F.adaptive_avg_pool1d: "average_pool",
    F.adaptive_avg_pool2d: "average_pool",
    F.adaptive_avg_pool3d: "average_pool",
    torch.mean: "average_pool",
    torch.flatten: "reshape",
    torch.reshape: "reshape",
    torch.permute: "reshape",
    torch.transpose: "reshape",
    torch.squeeze: "reshape",
    torch.unsqueeze: "reshape",
    torch.movedim: "reshape",
    torch.swapaxes: "reshape",
    torch.unbind: "slice",
    torch.roll: "reshape",
    torch.flip: "reshape",
    torch.tile: "reshape",
    torch.narrow: "slice",
    torch.repeat_interleave: "reshape",
    torch.pixel_shuffle: "reshape",
    torch.pixel_unshuffle: "reshape",
    torch.channel_shuffle: "reshape",
    torch.clone: "identity",
    operator.pos: "identity",
    F.dropout: "dropout",
    F.dropout1d: "dropout",
    F.dropout2d: "dropout",
    F.dropout3d: "dropout",
    F.alpha_dropout: "dropout",
    F.feature_alpha_dropout: "dropout",
    torch.dropout: "dropout",
    operator.getitem: "slice",
    torch.chunk: "slice",
    torch.split: "slice",
    F.pad: "pad",
    F.interpolate: "interpolate",
    F.unfold: "reshape",
    F.layer_norm: "layer_norm",
    F.group_norm: "group_norm",
    F.batch_norm: "batch_norm",
    F.rms_norm: "rms_norm",
    F.embedding: "embedding",
    F.scaled_dot_product_attention: "attention",
}

METHODS: dict[str, str] = {
    "add": "add",
    "add_": "add",
    "mul": "mul",
    "mul_": "mul",
    "matmul": "matmul",
    "bmm": "matmul",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "mean": "average_pool",
    "amax": "max_pool",
    "view": "reshape",
    "reshape": "reshape",
    "flatten": "reshape",
    "permute": "reshape",
    "transpose": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "contiguous": "reshape",
    "expand": "reshape",
    "expand_as": "reshape",
    "repeat": "reshape",
    "repeat_interleave": "reshape",
    "view_as": "reshape",
    "reshape_as": "reshape",
    "unflatten": "reshape",
    "movedim": "reshape",
    "swapaxes": "reshape",
    "roll": "reshape",
    "flip": "reshape",
    "tile": "reshape",
    "t": "reshape",
    "unfold": "reshape",
    "unbind": "slice",
    "narrow": "slice",
    "select": "slice",
    "clone": "identity",
    "detach": "identity",
    "cpu": "identity",
    "to": "identity",
    "float": "identity",
    "type": "identity",
    "type_as": "identity",
    "tanh": "tanh",
    "chunk": "slice",
    "split": "slice",
}

ATTRIBUTES = {"data": "identity", **dict.fromkeys(("device", "dtype", "shape", "ndim"), "size")}


def module_name(module: nn.Module) -> str:
    """Return the name of the operation that ``module`` does, empty if no table knows it."""
    return next((MODULES[base] for base in type(module).__mro__ if base in MODULES), "")


def op_name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the operation that ``node`` does.

    Args:
        node: A node of a captured graph.
        modules: Name to module of the captured model.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        return _variant(module_name(module), node, module) or type(module).__name__
    names = METHODS if node.op == "call_method" else FUNCTIONS
    if node.op in ("call_function", "call_method"):
        known = names.get(node.target, "")  # pyright: ignore[reportArgumentType, reportCallIssue]
        return _variant(known, node) or getattr(node.target, "__name__", str(node.target))
    return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)


def moves_codes(node: fx.Node, name: str) -> bool:
    """Whether the values of ``node`` are some of its inputs' values, or 0: codes stay codes.

    Args:
        node: A node of a captured graph.
        name: The name of its operation.
    """
    if name == "pad" and node.op == "call_function":
        value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        return value is None or bool(value == 0)
    return name in OPS and (OPS[name].passes or OPS[name].joins)


def _variant(name: str, node: fx.Node, module: nn.Module | None = None) -> str:
    """Tell apart what one function can be."""
    if name == "average_pool" and _averages_features(node):
        return "mean"
    if node.target is getattr:
        return ATTRIBUTES.get(str(node.args[1]), "")
    if name == "identity" and node.op == "call_method" and node.meta.get("shape") is None:
        return "cast"
    if name == "interpolate":
        mode = getattr(module, "mode", node.kwargs.get("mode", "nearest"))
        return name if str(mode).startswith("nearest") else "resize"
    return name


def _averages_features(node: fx.Node) -> bool:
    """Whether a mean is over the last axis alone, as inside a normalisation."""
    if node.target not in ("mean", torch.mean):
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    rank = len(node.all_input_nodes[0].meta.get("shape") or ())
    return dims in (-1, rank - 1, [-1], [rank - 1], (-1,), (rank - 1,))
