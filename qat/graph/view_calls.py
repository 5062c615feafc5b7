"""Functions of torch that are layers: what each is called with, as a view would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat.graph.view_modules import (
    BatchNorm1dView,
    BatchNorm2dView,
    BatchNorm3dView,
    Conv1dView,
    Conv2dView,
    Conv3dView,
    ConvTranspose1dView,
    ConvTranspose2dView,
    ConvTranspose3dView,
    EmbeddingView,
    LinearView,
    ProjectionView,
)


@dataclass(frozen=True)
class Call:
    """What a functional layer is called with.

    Attributes:
        kind: The class of its view.
        input: The input's proxy.
        tensors: Attribute to the proxy of a parameter or buffer of the model, or ``None``.
        options: Plain attributes of the view.
        addend: A bias that is computed, to add afterwards.
        evaluates: The layer is in eval mode, whatever the model's mode is.
    """

    kind: type[nn.Module]
    input: Any
    tensors: dict[str, Any]
    options: dict[str, Any]
    addend: Any = None
    evaluates: bool = False


def _all_stored(*values: Any) -> bool:
    """Whether the first value is a parameter or buffer as it stands in the model, and the rest too.

    Those that are ``None`` do not count, but for the first.
    """
    given = [values[0], *(v for v in values[1:] if v is not None)]
    return all(isinstance(v, fx.Proxy) and v.node.op == "get_attr" for v in given)


def _linear(tracer: Any, input: Any, weight: Any, bias: Any = None) -> Call | None:
    del tracer
    if not _all_stored(weight):
        return None
    out, width = weight.fakes[0].shape
    options = {"in_features": width, "out_features": out}
    stored, computed = (bias, None) if bias is None or _all_stored(bias) else (None, bias)
    return Call(LinearView, input, {"weight": weight, "bias": stored}, options, computed)


def _addmm(tracer: Any, input: Any, mat1: Any, mat2: Any, **options: Any) -> Call | None:
    del tracer
    if options or not _all_stored(mat2, input):
        return None
    width, out = mat2.fakes[0].shape
    tensors = {"weight": mat2, "bias": input}
    return Call(ProjectionView, mat1, tensors, {"in_features": width, "out_features": out})


def _conv(kind: type[nn.Module], rank: int) -> Any:
    def build(
        tracer: Any,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Call | None:
        del tracer
        if not _all_stored(weight, bias):
            return None
        options = _conv_options(weight, rank, stride, padding, dilation, groups)
        return Call(kind, input, {"weight": weight, "bias": bias}, options)

    return build


def _conv_transpose(kind: type[nn.Module], rank: int) -> Any:
    def build(
        tracer: Any,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Call | None:
        del tracer
        if not _all_stored(weight, bias):
            return None
        options = _conv_options(weight, rank, stride, padding, dilation, groups)
        width, out = weight.fakes[0].shape[:2]
        options |= {"out_channels": out * groups, "in_channels": width, "transposed": True}
        options["output_padding"] = _tuple(output_padding, rank)
        return Call(kind, input, {"weight": weight, "bias": bias}, options)

    return build


def _conv_options(
    weight: Any, rank: int, stride: Any, padding: Any, dilation: Any, groups: int
) -> dict[str, Any]:
    """Return the options of a convolution that is not transposed."""
    stride, padding, dilation = (_tuple(v, rank) for v in (stride, padding, dilation))
    out, width = weight.fakes[0].shape[:2]
    return {
        "out_channels": out,
        "in_channels": width * groups,
        "transposed": False,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": "zeros",
        "output_padding": (0,) * rank,
        "kernel_size": tuple(weight.fakes[0].shape[2:]),
    }


def _tuple(value: Any, rank: int) -> Any:
    return (value,) * rank if isinstance(value, int) else value


def _embedding(
    tracer: Any,
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    **options: Any,
) -> Call | None:
    del tracer
    if not _all_stored(weight) or max_norm is not None:
        return None
    number, width = weight.fakes[0].shape
    options = {"norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False, **options}
    options |= {"num_embeddings": number, "embedding_dim": width}
    options |= {"padding_idx": padding_idx, "max_norm": None}
    return Call(EmbeddingView, input, {"weight": weight}, options)


def _batch_norm(
    tracer: Any,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    kinds = {2: BatchNorm1dView, 3: BatchNorm1dView, 4: BatchNorm2dView, 5: BatchNorm3dView}
    shape = getattr(input, "fakes", (None,))[0]
    kind = None if shape is None else kinds.get(shape.ndim)
    evaluates = not training
    if kind is None or (training and not tracer.root.training) or running_mean is None:
        return None
    if not _all_stored(running_mean, running_var, weight, bias):
        return None
    tensors = {"weight": weight, "bias": bias}
    tensors |= {"running_mean": running_mean, "running_var": running_var}
    options = {"momentum": momentum, "eps": eps, "affine": weight is not None}
    options |= {"num_features": running_mean.fakes[0].numel(), "track_running_stats": True}
    options["num_batches_tracked"] = None  # the model counts by itself
    return Call(kind, input, tensors, options, evaluates=evaluates)


BUILDERS: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.conv1d: _conv(Conv1dView, 1),
    F.conv2d: _conv(Conv2dView, 2),
    F.conv3d: _conv(Conv3dView, 3),
    F.conv_transpose1d: _conv_transpose(ConvTranspose1dView, 1),
    F.conv_transpose2d: _conv_transpose(ConvTranspose2dView, 2),
    F.conv_transpose3d: _conv_transpose(ConvTranspose3dView, 3),
    F.embedding: _embedding,
    F.batch_norm: _batch_norm,
}
"""Function to what makes a call of its arguments, ``None`` where it is no layer with them."""
