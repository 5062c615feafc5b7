from collections import Counter
from functools import partial

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import fx, nn
from torch.nn import functional as F

from qat.errors import ExportError
from qat.export.agreement import compare_outputs
from qat.export.onnx import INPUT, OPSET, OUTPUT, export_onnx
from qat.export.runtime import OnnxModel
from qat.export.verify import compare_sites
from qat.graph.convert import convert
from qat.integer_layers import IntegerLayer
from qat.models import build
from qat.reference.run import IntegerRun
from qat.spec import Rule
from tests.export.conftest import Exported, export
from tests.helpers import HAS_VNNI, folded, make_scheme, smooth_images, warm_up

SCHEMES = [(8, 8), (4, 8), (4, 4), pytest.param((2, 2), marks=pytest.mark.slow)]
INTEGERS = {onnx.TensorProto.INT8, onnx.TensorProto.INT16}


def graph_of(exported: Exported) -> onnx.GraphProto:
    return onnx.load(exported.path).graph


def integer_weights(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Layer node to the initialiser that its weight is dequantized from."""
    makers = {name: node for node in graph.node for name in node.output}
    stored = {i.name: i for i in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            maker = makers[node.input[1]]
            while maker.op_type == "Transpose":
                maker = makers[maker.input[0]]
            assert maker.op_type == "DequantizeLinear", node.name
            found[node.name] = stored[maker.input[0]]
    return found


def optimised_ops(path, tmp_path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)


@pytest.mark.parametrize("bits", SCHEMES)
def test_weights_are_integers_in_the_file(exported_resnet20, bits):
    exported = exported_resnet20(*bits)
    graph = graph_of(exported)
    weights = integer_weights(graph)
    assert len(weights) == len(exported.plan.weights) == 20
    assert all(w.data_type == onnx.TensorProto.INT8 for w in weights.values())
    elements = sum(torch.tensor(w.dims).prod().item() for w in weights.values())
    assert elements == sum(p.numel() for p in build("resnet20", 10).parameters() if p.ndim > 1)
    # floats are scales: at most one for each channel
    floats = [i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert all(len(i.dims) <= 1 and sum(i.dims) <= 64 for i in floats)
    int32 = [i for i in graph.initializer if i.data_type == onnx.TensorProto.INT32]
    assert len(int32) == 20  # biases
    assert exported.path.stat().st_size < 450_000  # 268 thousand weights


def test_interface_of_the_file(exported_resnet20):
    exported = exported_resnet20(4, 4)
    proto = onnx.load(exported.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [o.version for o in proto.opset_import if o.domain == ""] == [OPSET]
    assert {o.domain for o in proto.opset_import} == {""}
    assert len(proto.functions) == 0
    (source,), (result,) = proto.graph.input, proto.graph.output
    assert (source.name, result.name) == (INPUT, OUTPUT) == ("input", "output")
    dims = source.type.tensor_type.shape.dim
    assert dims[0].dim_param == result.type.tensor_type.shape.dim[0].dim_param != ""
    assert [d.dim_value for d in dims[1:]] == [3, 32, 32]
    model = OnnxModel(exported.path)
    assert model.metadata == {"classes": ["a", "b"], "seed": 3}
    assert model.input_shape == (3, 32, 32)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_batch_size_runs_and_samples_do_not_mix(exported_resnet20, count):
    exported = exported_resnet20(4, 4)
    model = OnnxModel(exported.path)
    x = exported.x[:count]
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-5)


def test_nothing_of_the_exporting_machine_is_in_the_file(exported_resnet20):
    content = exported_resnet20(4, 4).path.read_bytes()
    for trace in (b"/tmp", b"/home", b"/work", b".py", b"site-packages", b"Traceback"):
        assert trace not in content, trace
    assert onnx.load_from_string(content).producer_name == "qat"


def test_weights_of_the_file_are_those_of_the_converted_model(exported_resnet20):
    exported = exported_resnet20(4, 8)
    stored = [onnx.numpy_helper.to_array(w) for w in integer_weights(graph_of(exported)).values()]
    layers = [m for m in exported.model.modules() if isinstance(m, IntegerLayer)]
    assert len(stored) == len(layers)
    for array, layer in zip(stored, layers, strict=True):
        assert torch.equal(torch.from_numpy(array.copy()), layer.weight_codes)


@pytest.mark.parametrize("bits", SCHEMES)
def test_onnxruntime_computes_what_the_converted_model_computes(exported_resnet20, bits):
    exported = exported_resnet20(*bits)
    logits = OnnxModel(exported.path)(exported.x)
    assert len(exported.logits.argmax(1).unique()) >= 6
    assert torch.equal(logits, exported.logits)


@pytest.mark.parametrize("bits", SCHEMES)
def test_every_code_is_equal(exported_resnet20, bits):
    exported = exported_resnet20(*bits)
    run = partial(IntegerRun, exported.model)
    found = compare_sites(run, exported.path, exported.sites, exported.x)
    assert [s.site for s in found] == exported.sites
    assert {s.partition("#")[0] for s in exported.sites} == set(exported.plan.activations)
    assert all(s.share == 0 for s in found)


# Without optimisations the file computes in float: its sums round in an order of their own, and a
# value close to the middle between two codes may take the other one.
@pytest.mark.parametrize("bits", SCHEMES)
def test_in_float_codes_are_equal_but_for_ties(exported_resnet20, bits):
    exported = exported_resnet20(*bits)
    run = partial(IntegerRun, exported.model)
    found = compare_sites(run, exported.path, exported.sites, exported.x, optimise=False)
    assert max(s.share for s in found) <= 5e-5
    assert max(s.largest for s in found) <= 1


@pytest.mark.parametrize("bits", SCHEMES)
def test_every_convolution_runs_on_integers(exported_resnet20, bits, tmp_path):
    ops = optimised_ops(exported_resnet20(*bits).path, tmp_path)
    assert ops["QLinearConv"] == 19
    assert ops["Conv"] == 0
    assert ops["QGemm"] == 1


@pytest.mark.slow
def test_mobilenet_runs_on_integers(tmp_path):
    torch.manual_seed(0)
    model = build("mobilenet_v2", 10, width_mult=0.25)
    exported = export(model, make_scheme(4, 4), smooth_images(16), tmp_path / "mobilenet.onnx")
    ops = optimised_ops(exported.path, tmp_path)
    assert ops["QLinearConv"] == 52
    assert ops["Conv"] == 0
    assert ops["QLinearGlobalAveragePool"] == 1
    assert torch.equal(OnnxModel(exported.path)(exported.x), exported.logits)


class Branches(nn.Module):
    """Windows averaged, branches joined, split, gated and normalised before their layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(12, 8, 3), nn.Conv2d(12, 8, 1)
        self.gate, self.norm, self.end = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1), self.wide(x)], 1)
        x, y = torch.relu(x).chunk(2, 1)
        y = self.right(y)[..., 1:-1, 1:-1]
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        x = torch.relu(self.norm(torch.cat([self.left(x), y], 1)))
        return self.end(x).mean((2, 3))


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_branches_run_on_integers_and_every_code_is_equal(bits, tmp_path):
    torch.manual_seed(0)
    x = smooth_images(16, 16)
    exported = export(Branches(), make_scheme(*bits), x, tmp_path / "branches.onnx")
    ops = optimised_ops(exported.path, tmp_path)
    assert ops["QLinearConv"] == 5
    assert ops["Conv"] + ops["FusedConv"] == 1  # its sigmoid reads real values
    assert (ops["QLinearConcat"], ops["QLinearAveragePool"], ops["QLinearMul"]) == (2, 1, 1)
    found = compare_sites(partial(IntegerRun, exported.model), exported.path, exported.sites, x)
    assert [s for s in found if s.share] == []
    torch.testing.assert_close(OnnxModel(exported.path)(x), exported.logits)  # averaged in float


class Parts(nn.Module):
    """What the networks above do not have."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(8, 1, 1))
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 4, 3, stride=4)
        self.end = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x) + self.position)
        x = torch.relu(self.norm(self.up(x)))
        return self.end(self.down(x).mean((2, 3)) * 2)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ({}, {"bits": 16}),
        ({"bits": 4, "group_size": 2}, {}),
        ({"bits": 16}, {"bits": 12}),
        ({"bits": 4, "symmetric": False, "narrow": False}, {"bits": 6, "symmetric": False}),
        ({"axis": None, "power_of_two": True}, {"power_of_two": True}),
    ],
    ids=str,
)
def test_other_formats_and_layers_load_and_agree(weight, activation, tmp_path):
    rules = {}
    if "group_size" in weight:
        rules["odd"] = Rule("conv|up", {"group_size": None})
    scheme = make_scheme(weight=weight, activation=activation, rules=rules)
    exported = export(Parts(), scheme, smooth_images(16, 8), tmp_path / "parts.onnx")
    weights = integer_weights(graph_of(exported))
    assert len(weights) == 4
    assert all(w.data_type in INTEGERS for w in weights.values())
    for optimise in (False, True):
        logits = OnnxModel(exported.path, optimise=optimise)(exported.x)
        agreement, difference = compare_outputs(exported.logits, logits)
        assert agreement == 1.0
        assert difference < 2
    run = partial(IntegerRun, exported.model)
    found = compare_sites(run, exported.path, exported.sites, exported.x)
    assert [s.site for s in found] == exported.sites
    ties = 1e-3 if exported.plan.activations["relu"].format.spec.bits <= 8 else 0.2
    assert max(s.share for s in found) <= ties
    assert max(s.largest for s in found) <= 2


def test_operations_without_an_onnx_form_are_refused(tmp_path):
    class Bessel(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.special.bessel_j0(self.fc(x))

    x = torch.randn(8, 4)
    captured, _ = folded(Bessel(), make_scheme(), x)
    with pytest.raises(ExportError, match="ONNX form"):
        export_onnx(convert(captured), x[:1], tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("op_type", ["Nonsense", "Add"])
def test_a_file_that_no_runtime_could_read_is_not_written(op_type, tmp_path, monkeypatch):
    """An operator that there is not, and one whose inputs are of two types."""
    infos = [
        helper.make_tensor_value_info(name, kind, [2])
        for name, kind in (("a", TensorProto.FLOAT), ("b", TensorProto.INT64))
    ]
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, [2])
    graph = helper.make_graph(
        [helper.make_node(op_type, ["a", "b"], ["output"])], "graph", infos, [result]
    )
    opsets = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    monkeypatch.setattr("qat.export.onnx._translate", lambda *args: proto)
    with pytest.raises(ExportError, match=r"valid ONNX model for 'model\.onnx', got .*" + op_type):
        export_onnx(fx.symbolic_trace(nn.Identity()), torch.zeros(2), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


class Means(nn.Module):
    """Averages over images, whose axes are counted from either end, and over other axes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        images = x.mean((2, 3)), x.mean((-1, -2)), x.mean((3, 2), keepdim=True)
        return *images, x.mean((1, 2)), x.flatten(2).mean(2), x.sigmoid() + 0.0


def test_averages_over_images_have_an_integer_kernel_and_nothing_is_merged(tmp_path):
    x = torch.randn(8, 3, 4, 4)
    captured, _ = folded(Means(), make_scheme(), x)
    converted = convert(captured)
    export_onnx(converted, x[:1], tmp_path / "model.onnx")
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert (ops["GlobalAveragePool"], ops["ReduceMean"], ops["Add"]) == (3, 2, 1)
    ours = [*OnnxModel(tmp_path / "model.onnx").run(x).values()]
    for found, expected in zip(ours, IntegerRun(converted)(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_export_keeps_the_model_and_warns_of_nothing(tmp_path, capsys, recwarn):
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    captured, _ = folded(warm_up(model, x), make_scheme(), x)
    converted = convert(captured)
    before = converted(x)
    export_onnx(converted, x[:1], tmp_path / "model.onnx")
    assert torch.equal(converted(x), before)
    assert capsys.readouterr().out == ""
    assert not recwarn.list


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(ExportError, match=r"none\.onnx"):
        OnnxModel(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    with pytest.raises(ExportError, match=r"broken\.onnx"):
        OnnxModel(broken)


class Weighing(nn.Module):
    """A softmax that reads codes, and a layer that is called with two scales."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.end = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.twice(torch.relu(self.twice(x)))
        weight = x.flatten(2).softmax(2)
        return self.end((weight @ x.flatten(2).transpose(1, 2)).mean(1))


def test_softmax_of_codes_and_layers_with_two_scales_are_exact(tmp_path):
    torch.manual_seed(0)
    x = smooth_images(16, 16)
    exported = export(Weighing(), make_scheme(8, 8), x, tmp_path / "weighing.onnx")
    ops = optimised_ops(exported.path, tmp_path)
    assert (ops["Softmax"], ops["QLinearSoftmax"], ops["QLinearConv"]) == (1, 0, 3)
    found = compare_sites(partial(IntegerRun, exported.model), exported.path, exported.sites, x)
    if HAS_VNNI:  # without it, onnxruntime cuts sums off where two layers have one weight
        assert [s for s in found if s.share > 1e-5] == []
