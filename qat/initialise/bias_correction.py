"""Bias correction: the mean error that quantized weights make in each channel goes into the bias.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, arXiv:1906.04721, section 4.2; in its empirical form, on data, from appendix D there and
Nagel et al., "A White Paper on Neural Network Quantization", 2021, arXiv:2106.08295, section 3.3.
Left out: the analytic form, which takes the means from batch-norms in place of data.

Layer by layer in order of execution, with ``W`` and ``W~`` the float and the quantized weight and
``x~`` what the layer reads behind layers that are quantized and corrected already, its bias changes
by ``E[W x~] - E[W~ x~]``, each output channel's mean over samples and positions: the error that its
own weight makes, and none that came with ``x~``. Activations pass in float, as their ranges are
observed later, behind the corrected layers. A batch-norm behind the layer takes the change in its
running mean, which is the mean of just that output; else the layer's own bias does. Layers with
neither, such as embeddings and convolutions that something else reads too, and tied biases stay as
they are. A layer that is called twice is corrected for both calls together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.graph.captured import Captured
from qat.initialise.base import Initialiser
from qat.initialise.layerwise import (
    count_calls,
    is_shared,
    layers_in_order,
    look_at,
    output_axis,
    output_with,
)
from qat.layers import QuantizedLayer


class BiasCorrection(Initialiser):
    """Give every layer's output the mean that its float weight gives, channel by channel.

    Args:
        num_batches: Training batches, under evaluation transforms, to take the means of.
    """

    reads_grids = True
    reads_codes = True

    def __init__(self, num_batches: int = 8) -> None:
        super().__init__(num_batches)

    def __call__(self, model: Captured, batches: Sequence[Any], reference: Captured) -> str:
        """Correct biases and running means in place.

        Args:
            model: A prepared model whose weights are quantized, and whose activations pass.
            batches: Inputs ``(N, ...)``, or calls.
            reference: The same in float.

        Returns:
            How many layers were corrected, and the names of those that were not.
        """
        calls = count_calls(model, batches[0])
        layers = layers_in_order(model, calls)
        places = {k: layer for k, layer in layers.items() if has_place(model, layer, calls)}
        for name, layer in places.items():
            twin = reference.get_submodule(name)
            assert isinstance(twin, QuantizedLayer)
            error = MeanError(layer, twin.raw_weight)
            look_at(model, name, batches, error, calls=calls[name])
            shift_output(layer, -error.mean)
        left = ", ".join(name for name in layers if name not in places)
        shown = f"; no bias or batch-norm of their own: {left}" if left else ""
        return f"corrected the biases of {len(places)} layers{shown}"


def has_place(model: Captured, layer: QuantizedLayer, calls: Counter[str]) -> bool:
    """Whether a batch-norm or a bias that is the layer's alone can take a change of its output.

    Args:
        model: A prepared model.
        layer: One of its layers.
        calls: How often each module runs for one batch.
    """
    bias = layer._parameters.get("bias")
    is_own = bias is not None and not is_shared(model, bias, calls)
    return layer.links.batch_norm is not None or is_own


class MeanError:
    """The mean error that a layer's quantized weight makes in each output channel.

    Args:
        layer: The layer, quantized.
        weight: Its weight in float.
    """

    def __init__(self, layer: QuantizedLayer, weight: Tensor) -> None:
        self.layer, self.weight = layer, weight
        self.sums: list[Tensor] = []
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Take in one call of the layer, which read ``x`` and returned ``y``."""
        error = y - output_with(self.layer, self.weight, x)
        rows = error.movedim(output_axis(self.layer, error), 0).flatten(1).double()
        self.sums.append(rows.sum(1))
        self.count += rows.shape[1]

    @property
    def mean(self) -> Tensor:
        """``E[W~ x] - E[W x]`` of all calls so far, real values, float64, shape ``(O,)``."""
        return torch.stack(self.sums).sum(0) / self.count


@torch.no_grad()
def shift_output(layer: QuantizedLayer, change: Tensor) -> None:
    """Add ``change`` to what a layer gives, in its batch-norm's running mean or its own bias.

    Args:
        layer: A layer that has one of them; it is changed in place.
        change: Real values, shape ``(O,)``.
    """
    norm, bias = layer.links.batch_norm, layer._parameters.get("bias")
    if norm is not None:
        norm.running_mean.sub_(change)
    else:
        assert bias is not None
        bias.add_(change)
