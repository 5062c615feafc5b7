"""Run a captured model once and note, at every node, the shape it makes and what that costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from qat.graph.trace import Captured


class _Meter(fx.Interpreter):
    """Interpreter that writes ``node.meta["shape"]`` and ``node.meta["macs"]``."""

    def __init__(self, module: nn.Module, graph: fx.Graph, batch: int) -> None:
        super().__init__(module, graph=graph)
        self.batch = batch

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        n.meta["macs"] = counter.get_total_flops() // 2 // self.batch
        is_real = isinstance(result, Tensor) and result.is_floating_point()
        n.meta["shape"] = tuple(result.shape) if is_real else None
        return result


def measure(captured: Captured) -> None:
    """Fill ``meta["shape"]`` (``None`` if no float tensor) and ``meta["macs"]`` of every node.

    Shapes are those of the example batch; multiply-accumulates are for one sample. Statistics and
    random state come back unchanged.

    Args:
        captured: A captured model on which nothing was inserted yet.
    """
    was_training = captured.training
    buffers = {k: v.clone() for k, v in captured.named_buffers()}
    for mode, graph in captured.graphs.items():
        captured.train(mode == "train")
        with torch.random.fork_rng(devices=[]):  # with gradients on: fused inference hides its cost
            _Meter(captured, graph, len(captured.example)).run(captured.example.clone())
    captured.train(was_training)
    for name, buffer in captured.named_buffers():
        buffer.copy_(buffers[name])
