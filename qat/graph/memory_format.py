"""Which convolutions train with channels innermost in memory: all but those with heavy weights.

With channels innermost, convolutions and what follows them run faster on CPUs, but every gradient
of a weight is copied into that order once it is made: as long as the convolution itself takes where
a weight has many more values than the images that it meets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx, nn

from qat.graph.captured import Captured

HEAVY = 2
"""Values of a weight for each of the images that its layer reads and makes, beyond which it stays
in rows: measured at 0.99 to 1.44 times the speed beyond, at 0.85 to 1.07 times below."""


def use_channels_last(model: Captured, batch_size: int | None = None) -> None:
    """Put the weights of convolutions in the order of channels last, in place, but heavy ones.

    Args:
        model: A prepared model.
        batch_size: Samples that a step has on one device; ``None`` where it is not the training
            graph that runs, which alone brings images in the order of heavy weights.
    """
    heavy = set[str]() if batch_size is None else set(_heavy(model, batch_size))
    for path, module in model.named_modules():
        if path not in heavy:
            for parameter in module.parameters(recurse=False):
                _reorder(parameter)


def _reorder(parameter: nn.Parameter) -> None:
    if parameter.ndim == 4:
        parameter.data = parameter.data.to(memory_format=torch.channels_last)


def _heavy(model: Captured, batch_size: int) -> Iterator[str]:
    if torch.accelerator.is_available():  # graphics processors want one order everywhere
        return
    for node in model.graphs["train"].find_nodes(op="call_module"):
        layer = model.get_submodule(str(node.target))
        if isinstance(layer, nn.Conv2d):
            images = sum(_size(n) for n in (node, *node.all_input_nodes[:1]))
            if layer._parameters["weight"].numel() > HEAVY * batch_size * images:  # pyright: ignore[reportOptionalMemberAccess]
                yield str(node.target)


def _size(node: fx.Node) -> float:
    """Return the values of one sample, for a fake-quant those that it reads; if unknown, many."""
    while "shape" not in node.meta and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    shape = node.meta.get("shape")
    return math.prod(shape[1:]) if shape else math.inf


def has_other_order(layer: nn.Module) -> bool:
    """Whether a convolution's weight lies in rows, so that images in that order suit it better."""
    weight = layer._parameters.get("weight") if isinstance(layer, nn.Conv2d) else None
    return weight is not None and not weight.is_contiguous(memory_format=torch.channels_last)
