"""Cross-layer equalisation: channels get the same range on both sides of a ReLU.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, arXiv:1906.04721, section 4.1, eq. 11. Left out: absorption of high biases (section
4.1.3), and the replacement of ReLU6 by ReLU, which changes the function.

A pair is two quantized layers, convolutions or linear ones, that nothing else reads from or writes
to between them, joined by operations that a positive factor passes through: the batch-norm that
belongs to the first, ReLU, dropout, pooling of a convolution's channels, flattening. Pairs that
are left alone: those across a sum, a concatenation, ReLU6, another activation or normalisation;
transposed convolutions; layers that are called twice; functional layers and tied parameters.

With a batch-norm, a channel's range is that of the folded weight, and the batch-norm is divided in
place of the layer. Where the first layer's grid lies on its raw weight (``batch_norm: late``), that
grid does not change, as folding gives it a scale for each channel; the second layer's grid gains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from qat.batch_norm import StagedBatchNorm, channel_gain
from qat.graph.captured import MODES, Captured
from qat.graph.op_names import op_name
from qat.initialise.base import Initialiser
from qat.layers import QuantizedLayer

CONVS = ("conv1d", "conv2d", "conv3d")
ANYWHERE = ("relu", "dropout", "identity", "FakeQuant")
POOLS = ("max_pool", "average_pool")
AXES_OF_CHOICE = ("mean", torch.mean, "amax", torch.amax)
"""Pools that may be over channels."""
MAX_SWEEPS = 100
CONVERGED = 1e-4


class Pair(NamedTuple):
    """Two layers whose channels can be scaled against each other.

    Attributes:
        first: Name of the layer whose output channels are divided.
        second: Name of the layer whose input channels are multiplied.
        batch_norm: Name of the batch-norm that is divided in place of ``first``, or ``None``.
    """

    first: str
    second: str
    batch_norm: str | None


class Equalise(Initialiser):
    """Equalise all pairs of a model, again and again until no range moves; no data are needed."""

    def __call__(self, model: Captured, batches: Sequence[Any], reference: Captured) -> str:
        """Scale weights, biases and batch-norms in place; the float function stays the same.

        Args:
            model: A prepared model whose weights are not quantized yet.
            batches: Not looked at.
            reference: Not looked at.
        """
        del batches, reference
        pairs = find_pairs(model)
        for _ in range(MAX_SWEEPS):
            if max((equalise_pair(model, pair) for pair in pairs), default=0.0) < CONVERGED:
                break
        shown = ", ".join(f"{pair.first} > {pair.second}" for pair in pairs)
        return f"equalised {len(pairs)} pairs of layers{': ' if shown else ''}{shown}"


def find_pairs(model: Captured) -> list[Pair]:
    """Return the pairs that are there in both modes, in order of execution.

    Args:
        model: A prepared model.
    """
    train, evaluation = (_pairs_of_graph(model, mode) for mode in MODES)
    return [pair for pair in evaluation if pair in train]


def _pairs_of_graph(model: Captured, mode: str) -> list[Pair]:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    calls = Counter(n.target for n in model.graphs[mode].nodes if n.op == "call_module")
    owners = Counter(
        id(p) for m in set(modules.values()) for p in m._parameters.values() if p is not None
    )

    def alone(name: str) -> bool:
        parameters = modules[name]._parameters.values()
        return calls[name] == 1 and all(owners[id(p)] == 1 for p in parameters if p is not None)

    found = [
        _pair_from(node, modules) for node in model.graphs[mode].nodes if node.op == "call_module"
    ]
    return [p for p in found if p and all(alone(name) for name in p if name is not None)]


def _pair_from(node: fx.Node, modules: dict[str, nn.Module]) -> Pair | None:
    """Follow what reads the layer at ``node``, up to the next layer or to what ends the pair."""
    first, name = str(node.target), op_name(node, modules)
    layer = modules[first]
    if name not in (*CONVS, "linear") or not isinstance(layer, QuantizedLayer):
        return None
    is_conv, norm = name != "linear", None
    while len(node.users) == 1:
        source, node = node, next(iter(node.users))
        name = op_name(node, modules)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantizedLayer):
            joined = name in CONVS if is_conv else name == "linear"
            return Pair(first, str(node.target), norm) if joined else None
        if module is not None and module is layer.links.batch_norm:
            norm = str(node.target)
            if module.weight is None:
                return None
        elif is_conv and _flattens(source, node, name):
            is_conv = False
        elif not _passes_factors(node, name, is_conv):
            return None
    return None


def _passes_factors(node: fx.Node, name: str, is_conv: bool) -> bool:
    pools = is_conv and name in POOLS and node.target not in AXES_OF_CHOICE
    return name in ANYWHERE or pools


def _flattens(source: fx.Node, node: fx.Node, name: str) -> bool:
    """Whether ``node`` lays all positions of one channel behind each other, samples apart."""
    before, after = (n.meta.get("shape") or () for n in (source, node))
    if name != "reshape" or len(before) < 3 or len(after) != 2:
        return False
    return after[1] == math.prod(before[1:])


@torch.no_grad()
def equalise_pair(model: nn.Module, pair: Pair) -> float:
    """Give each channel between two layers the same range on both sides (eq. 11).

    Args:
        model: The model that holds them; changed in place.
        pair: Names of the layers.

    Returns:
        How far the ranges were apart: the largest ``|log(s)|`` of all channels.
    """
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    norm = None if pair.batch_norm is None else model.get_submodule(pair.batch_norm)
    assert isinstance(first, QuantizedLayer)
    assert isinstance(second, QuantizedLayer)
    assert norm is None or isinstance(norm, StagedBatchNorm)
    r1, r2 = output_ranges(first), input_ranges(second, len(first.raw_weight))
    if norm is not None:
        r1 = r1 * channel_gain(norm).abs()
    is_dead = (r1 == 0) | (r2 == 0)
    s = torch.where(is_dead, torch.ones_like(r1), (r1 / r2).sqrt())  # = sqrt(r1 * r2) / r2
    divided = first if norm is None else norm
    for parameter in (divided._parameters[name] for name in ("weight", "bias")):
        if parameter is not None:
            parameter.div_(s.view(-1, *[1] * (parameter.ndim - 1)))
    weight = second._parameters["weight"]
    assert weight is not None
    _by_input(weight, second, len(s)).mul_(s.view(_groups(second), 1, -1, 1))
    return s.log().abs().max().item()


def output_ranges(layer: QuantizedLayer) -> Tensor:
    """Return the largest magnitude of each output channel's weights, real values, shape ``(O,)``.

    Args:
        layer: A convolution or linear layer.
    """
    return layer.raw_weight.abs().flatten(1).amax(1)


def input_ranges(layer: QuantizedLayer, channels: int) -> Tensor:
    """Return the largest magnitude of each input channel's weights, real values, shape ``(I,)``.

    Args:
        layer: A convolution or linear layer.
        channels: ``I``; a linear layer behind a flattening reads several features of each.
    """
    return _by_input(layer.raw_weight, layer, channels).abs().amax((1, 3)).flatten()


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


def _by_input(weight: Tensor, layer: nn.Module, channels: int) -> Tensor:
    """View a weight as ``(groups, outputs of a group, input channels of a group, the rest)``."""
    groups = _groups(layer)
    return weight.view(groups, len(weight) // groups, channels // groups, -1)
