"""The op table: what each operation means for quantization, one row each.

A node of a graph is named by the first column; the rows of ``OPS`` say what its inputs and its
output want. What no table knows is an op called by its own name that stays float, and is listed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Op:
    """What one kind of operation wants.

    Attributes:
        reads_codes: Its tensor inputs are quantized.
        passes: Its output holds values of its input: no quantizer between, the scale is shared.
        joins: Like ``passes`` with several inputs: all of them share one scale.
        nonnegative: Its output has no negative value.
        upper: Its output has no value above this one.
    """

    reads_codes: bool = False
    passes: bool = False
    joins: bool = False
    nonnegative: bool = False
    upper: float | None = None


OPS: dict[str, Op] = {
    "conv1d": Op(reads_codes=True),
    "conv2d": Op(reads_codes=True),
    "conv3d": Op(reads_codes=True),
    "conv_transpose1d": Op(reads_codes=True),
    "conv_transpose2d": Op(reads_codes=True),
    "conv_transpose3d": Op(reads_codes=True),
    "linear": Op(reads_codes=True),
    "matmul": Op(reads_codes=True),
    "add": Op(reads_codes=True),
    "mul": Op(reads_codes=True),
    "average_pool": Op(reads_codes=True),
    "concat": Op(joins=True),
    "relu": Op(nonnegative=True),
    "relu6": Op(nonnegative=True, upper=6.0),
    "sigmoid": Op(nonnegative=True, upper=1.0),
    "hardsigmoid": Op(nonnegative=True, upper=1.0),
    "softmax": Op(nonnegative=True, upper=1.0),
    "max_pool": Op(passes=True),
    "reshape": Op(passes=True),
    "dropout": Op(passes=True),
    "identity": Op(passes=True),
    "slice": Op(passes=True),
    "pad": Op(passes=True),
    "batch_norm": Op(),
    "layer_norm": Op(),
    "group_norm": Op(),
    "silu": Op(),
    "gelu": Op(),
    "hardswish": Op(),
    "embedding": Op(),
    "attention": Op(),
    "input": Op(),
    "constant": Op(),
}

WEIGHTED = {name for name in OPS if name.startswith("conv") and name != "concat"} | {"linear"}

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
    nn.ReLU6: "relu6",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Softmax: "softmax",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.MaxPool1d: "max_pool",
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveMaxPool2d: "max_pool",
    nn.AvgPool1d: "average_pool",
    nn.AvgPool2d: "average_pool",
    nn.AdaptiveAvgPool1d: "average_pool",
    nn.AdaptiveAvgPool2d: "average_pool",
    nn.AdaptiveAvgPool3d: "average_pool",
    nn.Flatten: "reshape",
    nn.Unflatten: "reshape",
    nn.Dropout: "dropout",
    nn.Dropout2d: "dropout",
    nn.Identity: "identity",
    nn.ZeroPad2d: "pad",
    nn.PixelShuffle: "reshape",
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
    torch.cat: "concat",
    torch.concat: "concat",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.hardsigmoid: "hardsigmoid",
    F.softmax: "softmax",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    torch.max_pool1d: "max_pool",
    torch.max_pool2d: "max_pool",
    F.adaptive_max_pool2d: "max_pool",
    F.avg_pool1d: "average_pool",
    F.avg_pool2d: "average_pool",
    F.adaptive_avg_pool1d: "average_pool",
    F.adaptive_avg_pool2d: "average_pool",
    torch.mean: "average_pool",
    torch.flatten: "reshape",
    torch.reshape: "reshape",
    torch.permute: "reshape",
    torch.transpose: "reshape",
    torch.squeeze: "reshape",
    torch.unsqueeze: "reshape",
    F.dropout: "dropout",
    operator.getitem: "slice",
    torch.chunk: "slice",
    torch.split: "slice",
    F.pad: "pad",
    F.layer_norm: "layer_norm",
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
    "view": "reshape",
    "reshape": "reshape",
    "flatten": "reshape",
    "permute": "reshape",
    "transpose": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "contiguous": "reshape",
    "expand": "reshape",
    "chunk": "slice",
    "split": "slice",
}


def op_name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Return the name of the operation that ``node`` does.

    Args:
        node: A node of a captured graph.
        modules: Name to module of the captured model.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        for base in type(module).__mro__:
            if base in MODULES:
                return MODULES[base]
        return type(module).__name__
    if node.op == "call_function":
        return FUNCTIONS.get(node.target, getattr(node.target, "__name__", str(node.target)))
    if node.op == "call_method":
        return METHODS.get(str(node.target), str(node.target))
    return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)
