"""What a file must not hold because onnxruntime would compute it badly, and whether that is so."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from qat.export.verify import compare_sites
from qat.export.workarounds import respect_limits
from qat.reference.run import IntegerRun
from qat.reference.values import Average, Product, Sum
from qat.spec import FLOAT, Rule
from tests.export.conftest import export
from tests.helpers import make_scheme, smooth_images
from tests.reference.test_run import grid, kernel, on_grid

LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")


def open_session(path: Path, level: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    options.optimized_model_filepath = f"{path}.optimised"
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def optimised(path: Path, level: str) -> Counter[str]:
    open_session(path, level)
    return Counter(n.op_type for n in onnx.load(f"{path}.optimised").graph.node)


def layers_of(ops: Counter[str]) -> tuple[int, int]:
    """Return how many layers multiply floats and how many multiply codes."""
    layers = {op: n for op, n in ops.items() if any(k in op for k in ("Conv", "Gemm", "MatMul"))}
    integer = sum(n for op, n in layers.items() if op.startswith("Q") or "Integer" in op)
    return sum(layers.values()) - integer, integer


class Mixed(nn.Module):
    """Layers that stay float between quantizes, with all that an optimiser takes away around."""

    def __init__(self):
        super().__init__()
        self.stem, self.end = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.plain, self.depthwise = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.up, self.normed = nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 8, 1)
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.eye(8) + torch.randn(8, 8) / 8)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem(x)), 2)
        x = F.relu6(self.plain(x))
        x = F.max_pool2d(self.depthwise(F.pad(x, (1, 1, 1, 1))), 2)
        x = torch.relu(self.norm(self.normed(self.up(x).transpose(2, 3))))
        return self.end(torch.relu(self.linear(x.mean((2, 3)))) @ self.table)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    torch.manual_seed(0)
    rules = {"float": Rule("plain|depthwise|up|normed|linear", FLOAT, None)}
    path = tmp_path_factory.mktemp("mixed") / "model.onnx"
    return export(Mixed(), make_scheme(rules=rules), smooth_images(32, 16), path)


@pytest.mark.parametrize("level", LEVELS)
def test_onnxruntime_leaves_float_weights_as_they_are(mixed, level):
    """``plain``, ``depthwise``, ``up``, ``normed``, ``linear`` and the product with ``table``."""
    is_formed = level in LEVELS[2:]
    assert layers_of(optimised(mixed.path, level)) == ((6, 2) if is_formed else (8, 0))


def test_codes_around_float_layers_are_equal_but_for_ties(mixed):
    run = partial(IntegerRun, mixed.model)
    found = compare_sites(run, mixed.path, mixed.sites, mixed.x)
    assert max(s.share for s in found) <= 1e-3
    assert max(s.largest for s in found) <= 1


def test_onnxruntime_still_quantizes_float_weights(mixed, tmp_path):
    """Once this fails, ``workarounds._float_layers`` is no longer needed."""
    proto = onnx.load(mixed.path)
    for front in [n for n in proto.graph.node if n.op_type == "Max"]:
        for node in proto.graph.node:
            node.input[:] = [front.input[0] if i == front.output[0] else i for i in node.input]
        proto.graph.node.remove(front)
    onnx.save(proto, tmp_path / "bare.onnx")
    assert layers_of(optimised(tmp_path / "bare.onnx", "ENABLE_ALL"))[1] > 2


RATIOS = [2.0**-30, 2.0**-4, 2.0**4, 2.0**30]
KERNELS = {
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "AveragePool": "QLinearAveragePool",
    "Add": "QLinearAdd",
    "Mul": "QLinearMul",
}


def between_grids(op: str, ratio: float, *, moved: bool) -> onnx.ModelProto:
    """Return ``op`` between codes, its input's scale ``ratio`` times its output's."""
    nodes, sources = [], []
    for i in range(2 if op in ("Add", "Mul") else 1):
        nodes.append(helper.make_node("DequantizeLinear", [f"x{i}", f"s{i}", "z"], [f"r{i}"]))
        sources.append(f"r{i}")
    if moved:
        nodes.append(helper.make_node("Transpose", ["r0"], ["t"], perm=[0, 1, 3, 2]))
        sources[0] = "t"
    options = {"kernel_shape": [2, 2]} if op == "AveragePool" else {}
    nodes.append(helper.make_node(op, sources, ["y"], name="op", **options))
    if moved and op == "GlobalAveragePool":
        nodes.append(helper.make_node("Squeeze", ["y", "axes"], ["flat"]))
    nodes.append(helper.make_node("QuantizeLinear", [nodes[-1].output[0], "s", "z"], ["codes"]))
    constants = {"s0": ratio, "s1": 1.0, "s": 1.0}
    stored = [numpy_helper.from_array(np.float32(v), k) for k, v in constants.items()]
    stored.append(numpy_helper.from_array(np.uint8(128), "z"))
    stored.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    shape = [1, 16, 16, 16]
    values = [
        helper.make_tensor_value_info(f"x{i}", TensorProto.UINT8, shape)
        for i in range(len(sources))
    ]
    result = helper.make_tensor_value_info("codes", TensorProto.UINT8, None)
    graph = helper.make_graph(nodes, "one", values, [result], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


JUST = 1 - 2.0**-20
BOUNDS = [
    ("GlobalAveragePool", 2.0**-8, 2.0**8 * JUST),
    ("AveragePool", 0.0, 2.0**22 * JUST),
    ("Mul", 0.0, 2.0**14 * JUST),  # by a second input with scale 1
    ("Add", 0.0, 2.0**22 - 2),
]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("op", "least", "most"), BOUNDS)
def test_only_what_lies_outside_its_bounds_is_rewritten(op, least, most, moved):
    changed = "ReduceMean" if op == "GlobalAveragePool" else "Max"
    beyond = most + 1 if op == "Add" else most / JUST
    cases = {least: False, most: False, beyond: True}
    for ratio, is_far in {**cases, least * JUST: least > 0}.items():
        proto = between_grids(op, ratio, moved=moved)
        respect_limits(proto)
        kinds = [node.op_type for node in proto.graph.node]
        assert (changed in kinds) is is_far, ratio
        assert (op in kinds) is (not is_far or changed == "Max")


@pytest.mark.parametrize(
    ("front", "behind", "is_between"),
    [
        (["DequantizeLinear"], ["QuantizeLinear"], True),
        (["DequantizeLinear", "Transpose", "Squeeze"], ["QuantizeLinear"], True),
        (["DequantizeLinear"], ["QuantizeLinear", "QuantizeLinear"], True),
        (["DequantizeLinear"], ["QuantizeLinear", "Relu"], False),
        (["DequantizeLinear"], [], False),
        (["DequantizeLinear", "Relu"], ["QuantizeLinear"], False),
        (["Cast"], ["QuantizeLinear"], False),
    ],
    ids=str,
)
def test_a_softmax_between_codes_computes_in_float(front, behind, is_between):
    names = [f"x{i}" for i in range(len(front) + 1)]
    more = {"DequantizeLinear": ["s", "z"], "QuantizeLinear": ["s", "z"]}
    nodes = [
        helper.make_node(kind, [name, *more.get(kind, [])], [result])
        for kind, name, result in zip(front, names, names[1:], strict=False)
    ]
    nodes.append(helper.make_node("Softmax", [names[-1]], ["y"]))
    nodes += [
        helper.make_node(kind, ["y", *more.get(kind, [])], [f"out{i}"])
        for i, kind in enumerate(behind)
    ]
    stored = [numpy_helper.from_array(np.float32(0.1), "s")]
    stored.append(numpy_helper.from_array(np.uint8(0), "z"))
    proto = helper.make_model(helper.make_graph(nodes, "one", [], [], stored))
    respect_limits(proto)
    kinds = [node.op_type for node in proto.graph.node]
    place = kinds.index("Softmax") + 1
    assert (kinds[place : place + 1] == ["Abs"]) is is_between
    assert ("Abs" in kinds) is is_between


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("op", KERNELS)
def test_operators_between_far_grids_run_and_are_exact(tmp_path, op, moved, ratio):
    """As behind a dead or an exploding layer: the kernel would fail, or turn over."""
    proto, path = between_grids(op, ratio, moved=moved), tmp_path / "model.onnx"
    respect_limits(proto)
    onnx.save(proto, path)
    is_near = 2.0**-8 <= ratio < 2.0**8
    is_formed = is_near or (ratio < 1 and op != "GlobalAveragePool")
    assert optimised(path, "ENABLE_ALL")[KERNELS[op]] == is_formed
    codes = torch.randint(0, 256, (2, 1, 16, 16, 16), dtype=torch.uint8)
    feeds = {v.name: x.numpy() for v, x in zip(proto.graph.input, codes, strict=False)}
    runs: list[Any] = [
        open_session(path, level).run(None, feeds)[0] for level in ("DISABLE_ALL", "ENABLE_ALL")
    ]
    assert len(np.unique(runs[0])) > 1 or ratio < 1
    assert np.abs(runs[0] - runs[1]).max() <= is_near


EVERY = torch.arange(256, dtype=torch.uint8)
PAIRS = [t.contiguous().flatten() for t in torch.meshgrid(EVERY, EVERY, indexing="ij")]


@pytest.mark.parametrize(("exponent", "exact"), [(-30, True), (13, True), (21, None), (26, False)])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul", "QLinearAveragePool"])
def test_kernels_turn_over_only_behind_our_limits(op, exponent, exact):
    """Once no kernel is wrong, ``workarounds._overflowing`` is no longer needed."""
    a, b, out = codecs = [grid(2.0**exponent, 128), grid(1.0, 100), grid(1.0, 128)]
    if op == "QLinearAveragePool":
        x, options = PAIRS[0].reshape(1, 1, 256, 256), {"kernel_shape": [3, 2], "strides": [2, 2]}
        ours = Average(F.avg_pool2d(on_grid(x, a).real(), (3, 2), 2)).codes(out)
        theirs = kernel(op, [x], [a, out], "com.microsoft", **options)
    else:
        left, right = (on_grid(x, codec) for x, codec in zip(PAIRS, (a, b), strict=True))
        ours = (Sum if op == "QLinearAdd" else Product)(left, right).codes(out)
        theirs = kernel(op, PAIRS, codecs, "com.microsoft")
    if exact is None:  # a product has reached its limit, sums have not
        exact = op != "QLinearMul"
    assert torch.equal(ours.clamp(0, 255), theirs) == exact


def test_integer_softmax_is_still_a_255th_too_small():
    """Once this fails, ``workarounds._integer_softmaxes`` is no longer needed."""
    fine, shares = grid(0.1, 128), grid(1 / 255, 0)
    x = torch.randint(0, 256, (64, 4), dtype=torch.uint8)
    got = kernel("QLinearSoftmax", [x], [fine, shares], "com.microsoft", axis=-1, opset=13)
    expected = (on_grid(x, fine).real().softmax(-1) * 255).round()
    assert (got - expected).abs().max() == 1
    assert (got <= expected).all()
