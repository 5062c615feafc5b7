"""One layer's task: what it reads behind quantized layers, and what it makes of it in float.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv:2004.10568, section 3.3, eq. 25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.batch_norm import channel_affine, channel_gain, channel_shift
from qat.graph.captured import Captured
from qat.graph.op_names import op_name
from qat.graph.ops import UNCHANGED
from qat.initialise.layerwise import look_at, output_axis, output_with
from qat.layers import QuantizedLayer

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "relu6": F.relu6}
CHUNK = 128
"""Samples at once where nothing is learned."""


class Reconstruction(NamedTuple):
    """What a layer reads, and what it should make of it (eq. 25).

    Attributes:
        layer: The layer.
        activation: What follows it and its batch-norm.
        inputs: Behind quantized layers. Shape ``(N, ...)``.
        targets: The float layer's output, behind batch-norm and activation. Shape ``(N, ...)``.
    """

    layer: QuantizedLayer
    activation: Activation
    inputs: Tensor
    targets: Tensor

    def loss(self, weight: Tensor, rows: Tensor | slice) -> Tensor:
        """Return the squared error of some samples, summed over channels, else averaged.

        Args:
            weight: What the layer would compute with, shape of its weight.
            rows: Which samples.
        """
        output = output_with(self.layer, weight, self.inputs[rows])
        output = finish(self.layer, self.activation, output)
        squares = (output - self.targets[rows]).square()
        return squares.sum(output_axis(self.layer, squares)).mean()

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """Return ``loss`` of ``weight`` over all samples."""
        count, total = len(self.inputs), 0.0
        for start in range(0, count, CHUNK):
            rows = slice(start, min(start + CHUNK, count))
            total += self.loss(weight, rows).item() * (rows.stop - rows.start)
        return total / count


def record(
    model: Captured, reference: Captured, name: str, batches: Sequence[Any]
) -> Reconstruction:
    """Run two models up to a layer that is called once, and keep what it reads and should return.

    Args:
        model: Quantized in front of the layer.
        reference: The same in float.
        name: Of the layer.
        batches: Inputs ``(N, ...)``.
    """
    layer, twin = model.get_submodule(name), reference.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(twin, QuantizedLayer)
    activation = activation_behind(model, name)
    inputs, targets = list[Tensor](), list[Tensor]()
    look_at(model, name, batches, lambda x, _: inputs.append(x))
    look_at(reference, name, batches, lambda _, y: targets.append(finish(twin, activation, y)))
    return Reconstruction(layer, activation, torch.cat(inputs), torch.cat(targets))


def finish(layer: QuantizedLayer, activation: Activation, output: Tensor) -> Tensor:
    """Return what the batch-norm of ``layer``, in evaluation mode, and ``activation`` make of it.

    Args:
        layer: The layer.
        activation: What follows both.
        output: What the layer returned, real values ``(N, ...)``.
    """
    norm = layer.links.batch_norm
    if norm is not None:
        output = channel_affine(output, channel_gain(norm).detach(), channel_shift(norm).detach())
    return activation(output)


def activation_behind(model: Captured, name: str) -> Activation:
    """Return the ReLU or ReLU6 that alone reads a layer or its batch-norm, else the identity.

    Args:
        model: A prepared model.
        name: Of the layer.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    norm = modules[name].links.batch_norm  # pyright: ignore[reportAttributeAccessIssue]
    node = next((n for n in model.graphs["eval"].nodes if n.target == name), None)
    while node is not None and len(node.users) == 1:
        node = next(iter(node.users))
        op = op_name(node, modules)
        if op in ACTIVATIONS:
            return ACTIVATIONS[op]
        is_norm = node.op == "call_module" and modules[str(node.target)] is norm
        if not (is_norm or op == "FakeQuant" or op in UNCHANGED):
            break
    return nn.Identity()
