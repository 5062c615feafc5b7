"""AdaRound: each weight is rounded up or down so that its layer's output changes least.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv:2004.10568, section 3.3; the half cosine of beta, and the defaults but for the number
of iterations, are those of AIMET, https://github.com/quic/aimet.

Layers are rounded in order of execution. With ``W`` the float weight, ``s`` its scale and ``x`` and
``x~`` what the layer reads in the float model and behind layers that are rounded already, ``V``
minimises ``||f(W x) - f(W~ x~)||^2 + regularisation * f_reg(V)``, ``W~ = s clip(floor(W / s) +
h(V))`` (eq. 22 to 25), by Adam. ``f`` is the batch-norm behind the layer and a ReLU or ReLU6 right
behind that. The squared error is summed over channels, and averaged over samples and positions.

Activations pass in float, as their ranges are observed later. What is written into the parameter
is the value of the chosen code, which rounding to nearest then keeps. Layers that are called
twice, that share their weight, and embeddings, whose nearest codes are the best, keep theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.data.source import generator
from qat.errors import ConfigError
from qat.functional.affine import expand
from qat.functional.rounding import (
    annealed_beta,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
)
from qat.graph.captured import Captured
from qat.graph.op_names import module_name
from qat.graph.ops import LAYERS
from qat.initialise.base import Initialiser
from qat.initialise.layerwise import count_calls, is_shared, layers_in_order
from qat.initialise.reconstruction import Reconstruction, record
from qat.kinds import each, number, require_all, whole
from qat.layers import QuantizedLayer, quantized_layers
from qat.quantizers import Deployable

KINDS = {
    "iterations": whole(1),
    "batch_size": whole(1),
    "learning_rate": number(above=0),
    "regularisation": number(0),
    "beta": each(number(above=0), 2, 2),
    "warm_up": number(0, below=1),
}


class AdaRound(Initialiser):
    """Choose for every weight of convolutions and linear layers whether it is rounded up or down.

    Args:
        num_batches: Training batches, under evaluation transforms, whose inputs of one layer at a
            time are held in memory; the paper takes 1024 images in all.
        iterations: Steps of Adam for each layer; the paper takes 10000.
        batch_size: Samples of a step.
        learning_rate: Of Adam.
        regularisation: Factor of the penalty that drives ``h`` to 0 or 1, the paper's lambda.
        beta: The penalty's exponent, first and last.
        warm_up: Share of the iterations without a penalty.

    Raises:
        ConfigError: If one of them is out of range.
    """

    reads_grids = True

    def __init__(
        self,
        num_batches: int = 8,
        iterations: int = 1000,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        regularisation: float = 0.01,
        beta: Sequence[float] = (20.0, 2.0),
        warm_up: float = 0.2,
    ) -> None:
        super().__init__(num_batches)
        values = {"iterations": iterations, "batch_size": batch_size, "beta": beta}
        values |= {"learning_rate": learning_rate, "regularisation": regularisation}
        require_all("initialise.adaround.", {**values, "warm_up": warm_up}, KINDS)
        self.iterations = iterations
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.regularisation = regularisation
        self.first_beta, self.last_beta = beta
        self.warm_up = warm_up

    def __call__(self, model: Captured, batches: Sequence[Any], reference: Captured) -> str:
        """Round weights in place, layer by layer in order of execution.

        Args:
            model: A prepared model whose weights are quantized, and whose activations pass.
            batches: Inputs ``(N, ...)``, or calls.
            reference: The same in float.

        Returns:
            How many layers were rounded and what remains of their error, and the names of others.

        Raises:
            ConfigError: If a quantizer does not take a weight on a code for that code.
        """
        _check_rounding(model)
        calls = count_calls(model, batches[0])
        layers, shares, left = layers_in_order(model, calls), list[float](), list[str]()
        for name, layer in layers.items():
            weight = layer._parameters["weight"]
            assert weight is not None
            is_alone = calls[name] == 1 and not is_shared(model, weight, calls)
            if is_alone and module_name(layer) in LAYERS:
                shares.append(self.round_layer(layer, record(model, reference, name, batches)))
            else:
                left.append(name)
        error = f"; mean error {mean(shares):.0%} of that of nearest rounding" if shares else ""
        others = f"; to the nearest: {', '.join(left)}" if left else ""
        return f"rounded {len(shares)} layers adaptively{error}{others}"

    def round_layer(self, layer: QuantizedLayer, task: Reconstruction) -> float:
        """Round one layer's weight in place; to the nearest where that is not worse.

        Args:
            layer: A layer whose weight is quantized.
            task: What it reads, and should make of it.

        Returns:
            Its squared error as a share of that of rounding to the nearest, at most 1.
        """
        grid = Grid.of(layer)
        candidates = [grid.weight(up) for up in (grid.nearest, self.learn(grid, task))]
        nearest, learnt = (task.error(weight) for weight in candidates)
        with torch.no_grad():
            layer._parameters["weight"].copy_(candidates[learnt < nearest])  # pyright: ignore[reportOptionalMemberAccess]
        return min(learnt / nearest, 1.0) if nearest > 0 else 1.0

    @torch.enable_grad()
    def learn(self, grid: Grid, task: Reconstruction) -> Tensor:
        """Return 1 where a weight should be rounded up, and 0 where down; shape of the weight.

        Args:
            grid: The weight between its codes.
            task: What the layer reads, and should make of it.
        """
        v = inverse_rectified_sigmoid(grid.rest).requires_grad_()
        adam = torch.optim.Adam([v], self.learning_rate)
        draw = generator("adaround")
        for i in range(self.iterations):
            rows = torch.randint(len(task.inputs), (self.batch_size,), generator=draw)
            h = rectified_sigmoid(v)
            loss = task.loss(grid.weight(h), rows.to(v.device))
            beta = annealed_beta(i / self.iterations, self.warm_up, self.first_beta, self.last_beta)
            if beta is not None:
                loss = loss + self.regularisation * rounding_penalty(h, beta)
            adam.zero_grad()
            loss.backward()
            adam.step()
        return (v >= 0).float()  # h >= 1/2


def _check_rounding(model: Captured) -> None:
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quant.quantizer
        is_grid = quantizer.deployable is Deployable.INTEGERS
        if not is_grid or getattr(quantizer, "rounding", "nearest") == "floor":
            raise ConfigError(
                "expected weights that are rounded to the nearest of equal steps for "
                f"initialise=adaround, got {type(quantizer).__name__} at layer '{name}': choose "
                "another quantizer for weights, or remove adaround."
            )


class Grid(NamedTuple):
    """A weight between its codes; all but ``qmin`` and ``qmax`` broadcast against the weight.

    Attributes:
        floor: The code below each weight, as if the grid had no ends and its zero point were 0.
        rest: How far each weight lies above that, 0 to 1.
        scale: Real units.
        zero_point: Code of the real value 0.
        factor: From the grid's real values to the raw weight; 0 where it is pruned.
        qmin: Lowest code.
        qmax: Highest code.
    """

    floor: Tensor
    rest: Tensor
    scale: Tensor
    zero_point: Tensor
    factor: Tensor
    qmin: int
    qmax: int

    @classmethod
    @torch.no_grad()
    def of(cls, layer: QuantizedLayer) -> Grid:
        """Return the grid of ``layer``, and where its raw weight lies on it."""
        quantizer, gain = layer.weight_quant.quantizer, layer.grid_gain
        values = (layer.raw_weight * gain).float()
        scale, zero_point = (
            expand(t.detach(), values.shape) for t in (quantizer.scale, quantizer.zero_point)
        )
        mask = layer._buffers.get("weight_mask")
        steps = values / scale
        factor = 1 / gain if mask is None else mask / gain
        spec = layer.spec
        floor = steps.floor()
        return cls(floor, steps - floor, scale, zero_point, factor, spec.qmin, spec.qmax)

    @property
    def nearest(self) -> Tensor:
        """1 where rounding to the nearest code, half to even, goes up, else 0."""
        return (self.floor + self.rest).round() - self.floor

    def weight(self, up: Tensor) -> Tensor:
        """Return the raw weight that lies ``up`` above the lower codes, real values (eq. 22).

        Args:
            up: 0 to 1, shape of the weight.
        """
        codes = (self.floor + up + self.zero_point).clamp(self.qmin, self.qmax)
        return (codes - self.zero_point) * self.scale * self.factor
