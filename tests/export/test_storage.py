"""Weights in 4 bits: the same real values, a smaller file, layers in float."""

from collections import Counter
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from qat.data import DigitsData
from qat.errors import ConfigError
from qat.export.agreement import compare_outputs
from qat.export.onnx import export_onnx
from qat.export.runtime import OnnxModel
from qat.export.storage import check_storage
from qat.export.verify import compare_sites
from qat.graph.convert import convert
from qat.integer_layers import IntegerLayer
from qat.models import build
from qat.reference.run import IntegerRun
from qat.spec import Rule
from tests.helpers import folded, make_scheme, smooth_images

FLOATS = Rule("*", activation="float")
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


class EveryLayer(nn.Module):
    """Each kind of layer once; every weight but one has an odd number of elements."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(33, 15)
        self.conv = nn.Conv1d(7, 5, 3, padding=1)
        self.depthwise = nn.Conv1d(5, 5, 3, padding=1, groups=5)
        self.up = nn.ConvTranspose1d(5, 3, 3)
        self.grouped = nn.ConvTranspose1d(3, 3, 3, groups=3)
        self.sequence = nn.Linear(19, 9, bias=False)
        self.twice = nn.Linear(9, 9)
        self.flat = nn.Linear(9, 5)

    def forward(self, tokens):
        x = self.depthwise(self.conv(self.embedding(tokens)))
        x = self.sequence(self.grouped(self.up(x)))
        return self.flat(self.twice(self.twice(x)).mean(1))


TOKENS = torch.randint(0, 33, (4, 7), generator=torch.Generator().manual_seed(0))
FORMATS = [
    {"axis": axis, "signed": signed, "symmetric": symmetric, "narrow": narrow}
    for axis in (0, None)
    for signed, symmetric, narrow in (
        (True, True, True), (True, True, False), (True, False, False),
        (False, False, False), (False, True, False),
    )
]  # fmt: skip


class SideBySide(nn.Module):
    """Every layer once for each format, so that one file shows them all."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(EveryLayer() for _ in FORMATS)

    def forward(self, tokens):
        return sum(part(tokens) for part in self.parts)


def write(model, scheme, x, path, storage="size"):
    captured, _ = folded(model, scheme, x)
    converted = convert(captured)
    return captured, converted, export_onnx(converted, x[:1], path, storage=storage)


def session(path, *, entries=(), optimised_path=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in dict(entries).items():
        options.add_session_config_entry(key, value)
    if optimised_path is not None:
        options.optimized_model_filepath = str(optimised_path)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def optimised_ops(path, tmp_path) -> Counter[str]:
    session(path, optimised_path=tmp_path / "optimised.onnx")
    return Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)


def kinds(path) -> dict[str, int]:
    return {i.name: i.data_type for i in onnx.load(path).graph.initializer}


def check_weights(converted, path, x):
    """Every weight that onnxruntime dequantizes is the converted model's, bit for bit."""
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    names = {n.input[0]: n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    layers = {n: m for n, m in converted.named_modules() if isinstance(m, IntegerLayer)}
    outputs = [names[f"{name}.weight_codes"] for name in layers]
    found = OnnxModel(path, optimise=False, outputs=outputs).run(x)
    for output, (name, layer) in zip(outputs, layers.items(), strict=True):
        value = torch.from_numpy(found[output])
        assert torch.equal(value, layer.weight) or torch.equal(value.T, layer.weight), name
        wanted = TensorProto.INT4 if layer.spec.signed else TensorProto.UINT4
        assert kinds(path)[f"{name}.weight_codes"] == wanted
    return len(layers)


@pytest.mark.parametrize("bits", [4, *(pytest.param(b, marks=pytest.mark.slow) for b in (2, 3))])
def test_weights_are_those_of_the_converted_model_bit_for_bit(bits, tmp_path):
    torch.manual_seed(0)
    rules = {str(i): Rule(f"parts.{i}.*", form) for i, form in enumerate(FORMATS)}
    scheme = make_scheme(bits, rules={"floats": FLOATS, **rules})
    path = tmp_path / "m.onnx"
    _, converted, _ = write(SideBySide(), scheme, TOKENS, path)
    assert check_weights(converted, path, TOKENS) == 8 * len(FORMATS)
    for optimise in (False, True):  # the same weights and nothing rounded in between
        logits = OnnxModel(path, optimise=optimise)(TOKENS)
        torch.testing.assert_close(logits, converted(TOKENS))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_groups_are_those_of_the_converted_model_bit_for_bit(bits, signed, tmp_path):
    torch.manual_seed(0)
    weight = {"group_size": 3, "narrow": False, "signed": signed, "symmetric": signed}
    rest = Rule("conv|depthwise|up|grouped|sequence", {"group_size": None})
    scheme = make_scheme(bits, weight=weight, rules={"floats": FLOATS, "rest": rest})
    path = tmp_path / "m.onnx"
    _, converted, _ = write(EveryLayer(), scheme, TOKENS, path)
    assert check_weights(converted, path, TOKENS) == 8
    blocks = [m for m in converted.modules() if isinstance(m, IntegerLayer) and m.block]
    assert len(blocks) == 3
    torch.testing.assert_close(OnnxModel(path)(TOKENS), converted(TOKENS))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small network that knows its digits, converted, and its files of both kinds."""
    torch.manual_seed(0)
    data = DigitsData()
    data.setup()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(8):
        for x, y in data.train_dataloader():
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    x, y = map(torch.cat, zip(*data.test_dataloader(), strict=True))
    captured, _ = folded(model.eval(), make_scheme(4, 8), x)
    converted, folder = convert(captured), tmp_path_factory.mktemp("digits")
    paths = {name: folder / f"{name}.onnx" for name in ("speed", "size")}
    sites = [export_onnx(converted, x[:1], p, storage=s) for s, p in paths.items()]
    assert sites[0] == sites[1]
    return captured, converted, paths, sites[0], x, y


# Sums of real values round in an order of their own; a value close to the middle between two codes
# may take the other one, as in the file for speed without optimisations. A code that turned in the
# output is at most two 255ths of the outputs' range: symmetric grids reach to both sides alike.
def test_predictions_are_those_of_the_file_for_speed(digits):
    captured, converted, paths, sites, x, y = digits
    reference = IntegerRun(captured)(x)
    assert (reference.argmax(1) == y).double().mean() > 0.9
    assert compare_outputs(reference, OnnxModel(paths["speed"])(x)) == (1.0, 0.0)
    run = partial(IntegerRun, converted)
    for optimise in (True, False):
        logits = OnnxModel(paths["size"], optimise=optimise)(x)
        agreement, difference = compare_outputs(reference, logits)
        assert agreement >= 0.999  # the gate of a run
        assert difference <= 2
        found = compare_sites(run, paths["size"], sites, x, optimise=optimise)
        assert max(s.share for s in found) <= 5e-5
        assert max(s.largest for s in found) <= 1
        assert compare_outputs(captured(x), logits)[0] >= 0.999  # simulated in float, too


def test_the_bias_keeps_its_codes(digits):
    biases = [
        {
            i.name: numpy_helper.to_array(i)
            for i in onnx.load(path).graph.initializer
            if "bias" in i.name
        }
        for path in digits[2].values()
    ]
    assert len(biases[0]) == 6
    for name, value in biases[0].items():
        assert value.dtype == biases[1][name].dtype
        assert np.array_equal(value, biases[1][name])


def test_layers_compute_in_float(digits, tmp_path):
    speed, size = (optimised_ops(path, tmp_path) for path in digits[2].values())
    assert (speed["QLinearConv"], speed["QGemm"]) == (2, 1)
    assert size["QLinearConv"] + size["QGemm"] + size["MatMulNBits"] == 0
    assert size["Conv"] + size["FusedConv"] == 2
    assert size["Gemm"] == 1


def test_wide_weights_stay_in_eight_bits(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)), torch.randn(8, 6)
    scheme = make_scheme(4, rules={"ends": Rule("@first|@last", {"bits": 8})})
    write(model, scheme, x, tmp_path / "m.onnx")
    found = {n: k for n, k in kinds(tmp_path / "m.onnx").items() if n.endswith("weight_codes")}
    int8, int4 = TensorProto.INT8, TensorProto.INT4
    assert list(found.values()) == [int8, int4, int8]


class Matrices(nn.Module):
    """Products with matrices: of sequences, of rows, and with a matrix in turned order."""

    def __init__(self, width):
        super().__init__()
        self.sequence, self.rows = nn.Linear(width, 48), nn.Linear(48, 5)
        self.turned, self.bias = nn.Parameter(torch.randn(48, 48)), nn.Parameter(torch.randn(48))

    def forward(self, x):
        x = torch.addmm(self.bias, self.sequence(x).flatten(0, 1), self.turned)
        return self.rows(x)


@pytest.mark.parametrize(
    ("width", "group", "fused"),
    [(64, 8, False), (64, 16, True), (64, 32, True), (256, 128, True), (96, 24, False)],
)
def test_blocks_of_a_power_of_two_from_16_become_one_operator(width, group, fused, tmp_path):
    torch.manual_seed(0)
    x, path = torch.randn(8, 6, width), tmp_path / "m.onnx"
    rules = {
        "floats": FLOATS,
        "group": Rule("sequence", {"group_size": group}),
        "rows": Rule("rows", {"group_size": 16}),
    }
    scheme = make_scheme(4, weight={"narrow": False}, rules=rules)
    _, converted, _ = write(Matrices(width), scheme, x, path)
    assert check_weights(converted, path, x) == 3
    assert optimised_ops(path, tmp_path)["MatMulNBits"] == 1 + fused
    (exact,) = session(path, entries=EXACT).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(exact), converted(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, None])
def test_other_matrices_do_not(axis, tmp_path):
    torch.manual_seed(0)
    x, path = torch.randn(8, 6, 64), tmp_path / "m.onnx"
    scheme = make_scheme(4, weight={"axis": axis}, rules={"floats": FLOATS})
    _, converted, _ = write(Matrices(64), scheme, x, path)
    assert check_weights(converted, path, x) == 3
    assert optimised_ops(path, tmp_path)["MatMulNBits"] == 0
    torch.testing.assert_close(OnnxModel(path)(x), converted(x), rtol=1e-4, atol=1e-5)


def test_the_one_operator_still_rounds_what_it_multiplies_with(tmp_path):
    """Once this fails, ``storage._rows`` is no longer needed."""
    torch.manual_seed(0)
    x, path = torch.randn(8, 6, 64), tmp_path / "m.onnx"
    rules = {"floats": FLOATS, "group": Rule("sequence", {"group_size": 16})}
    scheme = make_scheme(4, weight={"narrow": False}, rules=rules)
    _, converted, _ = write(Matrices(64), scheme, x, path)
    errors = []
    for entries in ((), EXACT):
        (found,) = session(path, entries=entries).run(None, {"input": x.numpy()})
        errors.append((torch.from_numpy(found) - converted(x)).abs().max().item())
    assert errors[0] > 100 * errors[1]


def test_unknown_storage_is_refused():
    assert check_storage("size") == "size"
    with pytest.raises(ConfigError, match="one of speed, size, got 'tiny'"):
        check_storage("tiny")


@pytest.mark.parametrize(
    ("bits", "storage", "megabytes"),
    [
        pytest.param(8, "speed", 11.9, marks=pytest.mark.slow),
        pytest.param(4, "speed", 11.9, marks=pytest.mark.slow),
        (4, "size", 6.3),
    ],
)
def test_size_of_resnet18(bits, storage, megabytes, tmp_path):
    torch.manual_seed(0)
    x = smooth_images(4)
    rules = {"ends": Rule("@first|@last", {"bits": 8}, {"bits": 8})}
    path = tmp_path / "m.onnx"
    write(build("resnet18", 1000), make_scheme(bits, rules=rules), x, path, storage)
    assert path.stat().st_size <= megabytes * 1e6
    stored = map(numpy_helper.to_array, onnx.load(path).graph.initializer)
    assert max(a.size for a in stored if a.dtype == np.float32) == 1000  # the last layer's scales
