"""What a packed file may ask for: every operation by name, and nothing else.

A graph that comes out of a file is never code: it names functions, methods and modules of this
list, which compute tensors and cannot touch files, processes or the state of Python.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

_OPERATOR = (
    "add iadd sub isub mul imul truediv itruediv floordiv mod pow neg matmul getitem setitem "
    "eq ne lt le gt ge and_ or_ xor invert"
)
_TORCH = (
    "abs add addmm all amax amin any arange argmax argmin argsort baddbmm bmm bucketize cat ceil "
    "chunk clamp clone concat conv1d conv2d conv3d cos cumsum div einsum eq erf exp expand_copy "
    "flatten flip floor floor_divide fmod full full_like gather ge gt index_select isfinite isnan "
    "le linspace log logical_and logical_not logical_or logical_xor lt masked_fill matmul max "
    "max_pool1d max_pool2d maximum mean meshgrid min minimum movedim mul narrow ne neg ones "
    "ones_like outer permute pixel_shuffle pixel_unshuffle channel_shuffle pow reciprocal relu "
    "remainder repeat_interleave reshape roll round rsqrt scatter searchsorted select sigmoid sign "
    "sin softmax sort split sqrt square squeeze stack std sub sum swapaxes take_along_dim tanh "
    "tensor_split tile topk transpose tril triu trunc unbind unflatten unsqueeze var where zeros "
    "zeros_like"
)
_FUNCTIONAL = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm conv1d "
    "conv2d conv3d dropout elu embedding gelu glu group_norm hardsigmoid hardswish hardtanh "
    "interpolate layer_norm leaky_relu linear log_softmax max_pool1d max_pool2d max_pool3d mish "
    "normalize one_hot pad relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu "
    "softmax softplus tanh unfold bilinear cosine_similarity embedding_bag fold hardshrink "
    "instance_norm logsigmoid lp_pool1d lp_pool2d pairwise_distance softmin softshrink softsign "
    "tanhshrink threshold"
)
_METHODS = (
    "abs add add_ all amax amin any argmax argmin argsort bmm bool ceil chunk clamp clone "
    "contiguous cos cumsum detach dim div eq erf exp expand expand_as flatten flip float floor "
    "floor_divide fmod gather ge gt index_select int le log logical_and logical_not logical_or "
    "logical_xor long lt masked_fill matmul max mean min movedim mul mul_ narrow ne neg new_full "
    "new_ones new_zeros numel permute pow relu relu_ remainder repeat repeat_interleave reshape "
    "reshape_as roll round rsqrt scatter select sigmoid sign sin size softmax sort split sqrt "
    "square squeeze std sub sum swapaxes t tanh tile to topk transpose tril triu trunc type "
    "type_as unbind unflatten unfold unsqueeze var view view_as"
)
_MODULES = (
    "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear Embedding "
    "BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm GroupNorm RMSNorm LocalResponseNorm "
    "ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Sigmoid Hardsigmoid Hardswish "
    "Hardtanh Tanh Softplus Softmax LogSoftmax GLU Identity Dropout Dropout1d Dropout2d Dropout3d "
    "AlphaDropout MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d "
    "AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
    "Flatten Unflatten Upsample ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d "
    "ReflectionPad2d ReplicationPad2d PixelShuffle PixelUnshuffle ChannelShuffle "
    "ConstantPad3d ReflectionPad1d ReflectionPad3d ReplicationPad1d ReplicationPad3d CircularPad1d "
    "CircularPad2d CircularPad3d FeatureAlphaDropout UpsamplingNearest2d UpsamplingBilinear2d "
    "InstanceNorm1d InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d LPPool3d Unfold Fold "
    "Threshold Softshrink Hardshrink Tanhshrink LogSigmoid Softsign Softmin Softmax2d RReLU "
    "EmbeddingBag Bilinear PairwiseDistance CosineSimilarity "
    "RNN LSTM GRU RNNCell LSTMCell GRUCell"
)


def _named(prefix: str, owner: Any, names: str) -> Iterator[tuple[str, Any]]:
    for name in names.split():
        yield f"{prefix}.{name}", getattr(owner, name)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict(_named("operator", operator, _OPERATOR)),
    **dict(_named("torch", torch, _TORCH)),
    **dict(_named("functional", F, _FUNCTIONAL)),
    "builtins.getattr": builtins.getattr,
}
"""Name to function; ``getattr`` only reads an attribute of ``ATTRIBUTES``."""

FUNCTION_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
METHODS = frozenset(_METHODS.split())
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT"})
MODULES: dict[str, type[nn.Module]] = {
    **{name: getattr(nn, name) for name in _MODULES.split()},
    **{name: getattr(torchvision.ops, name) for name in ("Permute", "StochasticDepth")},
}
_DTYPES = "bool uint8 int8 uint16 int16 int32 int64 float16 bfloat16 float32 float64"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPES.split()}
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.RNN: (*_RECURRENT, "bidirectional", "nonlinearity"),
    nn.LSTM: (*_RECURRENT, "bidirectional", "proj_size"),
    nn.GRU: (*_RECURRENT, "bidirectional"),
}
"""Arguments of constructors that do not name them."""
ATTRIBUTE_OF: dict[tuple[type[nn.Module], str], str] = {(nn.PairwiseDistance, "p"): "norm"}
"""Arguments of constructors that modules keep under another name."""
MOST_LAYERS = 1000
"""Of one recurrent module: each is made by Python code."""
LARGEST = 2**63
"""Whole numbers of a file are smaller."""
