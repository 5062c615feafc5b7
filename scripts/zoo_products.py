"""Multiply-accumulates of a reference run and of an ONNX file, counted without asking the plan.

The reference is counted by torch's own counter, the file by the shapes that its operators meet in
onnxruntime. What is computed of constants alone does not count: it is done once, not for samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor, fx, nn
from torch.utils import flop_counter

from qat.reference import leaves, run
from qat.reference.run import IntegerRun

aten = torch.ops.aten
MORE = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        flop_counter.sdpa_flop_count(q, k, v)
    ),
    aten._trilinear: lambda a, w, *_, **__: 2 * a[0] * prod(w),
    aten._grouped_mm: lambda a, b, *_, **__: 2 * prod(a) * b[-1],
    aten.mv: lambda m, *_, **__: 2 * prod(m),
}


NEAR = 1e-3
"""Largest difference between the shares in float that a plan says and that are counted."""


class Counter(flop_counter.FlopCounterMode):
    """torch's counter, with operators that it does not know; LSTMs are counted by formula."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=MORE)

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return self.get_total_flops() // 2


def lstm_macs(module: nn.LSTM, x: Tensor) -> int:
    """Return the multiply-accumulates of an LSTM on a batch ``(..., features)``."""
    sides, width = 1 + module.bidirectional, module.proj_size or module.hidden_size
    layers = [module.input_size] + [width * sides] * (module.num_layers - 1)
    gates = sum(sides * 4 * module.hidden_size * (size + width) for size in layers)
    projections = module.num_layers * sides * module.hidden_size * module.proj_size
    return x.numel() // x.shape[-1] * (gates + projections)


def _append_lstm(found: list[int], module: Any, args: Any, _: Any) -> None:
    found.append(lstm_macs(module, args[0]))


class CountedRun(IntegerRun):
    """The integer reference, with the products of all nodes and of integer kernels counted."""

    total = integer = 0

    def count(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the multiply-accumulates of one batch: all, and those in float."""
        self.total, self.integer = 0, 0
        self.written: set[fx.Node] = set()
        data: set[fx.Node] = set()
        graph: Any = self.graph
        for node in graph.nodes:
            sizes = node.op == "call_method" and node.target == "size"
            if node.op == "placeholder" or (data & set(node.all_input_nodes) and not sizes):
                data.add(node)
                self.written |= {node.args[0]} if node.target is operator.setitem else set()
                data |= self.written
        self.data = data
        pairs = {name: self._counted(kernel) for name, kernel in run.PAIRS.items()}
        layer = self._counted(run.accumulate)
        with (
            patch.object(run, "PAIRS", pairs),
            patch.object(run, "accumulate", layer),
            patch.object(leaves, "accumulate", layer),
        ):
            self(*args, **kwargs)
        return self.total, self.total - self.integer

    def _counted(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            with Counter() as counter:
                result = kernel(*args)
            self.integer += counter.macs
            return result

        return count

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and count its products if it reads the data."""
        module = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        lstms: list[int] = []
        hooks = [
            m.register_forward_hook(partial(_append_lstm, lstms))
            for m in (module.modules() if module is not None else ())
            if isinstance(m, nn.LSTM) and not m.proj_size
        ]
        with Counter() as counter:
            result = super().run_node(n)
        for hook in hooks:
            hook.remove()
        self.total += (counter.macs + sum(lstms)) * (n in self.data)
        return result


MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Concat",
         "Expand", "Tile", "Identity", "Flatten", "Pad", "GatherND", "GatherElements")  # fmt: skip
RECURRENT = ("LSTM", "GRU", "RNN")
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm", *RECURRENT)


def count_file(path: Path, feeds: dict[str, Any]) -> tuple[int, int]:
    """Return the multiply-accumulates of one batch: all, and those that do not read codes."""
    proto = onnx.load(path)
    graph = proto.graph
    stored = {t.name: tuple(t.dims) for t in graph.initializer}
    data, codes = {i.name for i in graph.input}, set[str]()
    products = []
    for node in graph.node:
        real = [name for name in node.input[:2] if name]
        if data & set(node.input) and node.op_type not in ("Shape", "Size"):
            data.update(node.output)
            products += [node] if node.op_type in PRODUCTS else []
        moved = node.op_type in MOVES and real[0] in codes
        if node.op_type == "DequantizeLinear" or moved:
            codes.update(node.output)
    assert not [n.op_type for n in graph.node if n.op_type in ("Einsum", "Attention", "Loop", "If")]
    shown = {name for n in products for name in (*n.input[:3], n.output[0]) if name}
    shown -= set(stored) | {o.name for o in graph.output}
    del graph.value_info[:]
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(shown))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds), strict=True))
    shapes = {**stored, **{name: np.asarray(value).shape for name, value in found.items()}}
    costs = [(_macs(n, shapes), set(n.input[:2]) <= codes) for n in products]
    return sum(c for c, _ in costs), sum(c for c, is_integer in costs if not is_integer)


def _macs(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    x, w, y = (shapes[name] for name in (*node.input[:2], node.output[0]))
    if node.op_type in RECURRENT:
        return prod(x[:2]) * (prod(w) + prod(shapes[node.input[2]]))
    if node.op_type == "ConvTranspose":
        return prod(x) * prod(w[1:])
    if node.op_type == "Conv":
        return prod(y) * prod(w[1:])
    turned = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
    return prod(y) * x[0 if turned else -1]
