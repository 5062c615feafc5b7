"""What each target makes of each format, that these facts hold, and how findings are told."""

import itertools
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from qat.errors import ConfigError, GraphError
from qat.export.onnx import export_onnx
from qat.graph.convert import convert
from qat.graph.lint import FILE, check, lint, needed_opset, summary
from qat.graph.plan import ActivationSite, Format, Plan, WeightSite
from qat.graph.targets import TARGETS, find_target
from qat.spec import QuantSpec
from tests.helpers import folded, make_scheme

WEIGHT = QuantSpec(8, axis=0, narrow=True)
ACTIVATION = QuantSpec(8, signed=False)
SHAPE = (8, 4, 3, 3)


def plan_of(weight=WEIGHT, activation=ACTIVATION, op="conv2d", shape=SHAPE, layers=1) -> Plan:
    """A plan of ``layers`` layers a, b, ... which all read the activation x."""
    plan = Plan("hand-made")
    site = ActivationSite("x", "relu", (2, 4, 8, 8), Format(activation, "uniform", "min_max"))
    plan.activations["x"] = site
    form = Format(weight, "uniform", "min_max")
    for name in "abcdefgh"[:layers]:
        plan.weights[name] = WeightSite(name, op, shape, form, "x", None, "late", 1)
    return plan


FORMATS = {
    "8-bit": plan_of(),
    "narrow weight": plan_of(replace(WEIGHT, bits=4)),
    "wide weight": plan_of(replace(WEIGHT, bits=16)),
    "affine weight": plan_of(QuantSpec(8, symmetric=False, axis=0)),
    "unsigned weight": plan_of(QuantSpec(8, signed=False, axis=0)),
    "group weight": plan_of(replace(WEIGHT, group_size=2)),
    "weight per input": plan_of(replace(WEIGHT, axis=1)),
    "weight per tensor": plan_of(replace(WEIGHT, axis=None)),
    "signed": plan_of(activation=QuantSpec(8)),
    "narrow": plan_of(activation=QuantSpec(4)),
    "wide": plan_of(activation=QuantSpec(16, signed=False)),
    "affine": plan_of(activation=QuantSpec(8, signed=False, symmetric=False)),
    "7-bit unsigned": plan_of(activation=QuantSpec(7, signed=False)),
}
# A letter for each target in the order of HEAD: warning, error, or nothing to say.
HEAD = ("generic", "onnxruntime_cpu", "openvino", "xnnpack", "tensorrt")
EXPECTED = {
    "8-bit": {"x": "....e"},
    "narrow weight": {"a.weight": ".wwww", "x": "....e"},
    "wide weight": {"a.weight": ".wwwe", "x": "....e"},
    "affine weight": {"a.weight": "..wwe", "x": "....e"},
    "unsigned weight": {"a.weight": "...we", "x": "....e"},
    "group weight": {"a.weight": ".wwwe", "x": "....e"},
    "weight per input": {"a.weight": "eeeee", "x": "....e"},
    "weight per tensor": {"x": "....e"},
    "signed": {},
    "narrow": {"x": ".wwww"},
    "wide": {"x": ".wwwe"},
    "affine": {"x": "....e"},
    "7-bit unsigned": {"x": ".wwww"},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("target", HEAD)
def test_every_target_with_every_format(target, name):
    found = {f.site: f.level[0] for f in lint(FORMATS[name], TARGETS[target]) if f.site != FILE}
    column = HEAD.index(target)
    letters = {site: row[column] for site, row in EXPECTED[name].items()}
    assert found == {site: letter for site, letter in letters.items() if letter != "."}


@pytest.mark.parametrize("name", FORMATS)
def test_without_vnni_findings_are_those_of_onnxruntime_and_saturation(name):
    def known(target):
        return {(f.level, f.site, f.message.partition("onnxruntime")[0]) for f in lint(*target)}

    with_vnni = known((FORMATS[name], TARGETS["onnxruntime_cpu"]))
    more = known((FORMATS[name], TARGETS["onnxruntime_cpu_no_vnni"])) - with_vnni
    assert all("cut off" in message and level == "warning" for level, _, message in more)


def stored_codes(spec, *, activation):
    """The codes of a format as ``model.onnx`` stores them."""
    moved = 128 if activation and spec.signed else 0
    gain = 1 if activation else spec.storage_gain
    return [gain * code + moved for code in (spec.qmin, spec.qmax)]


def test_saturation_is_found_where_two_products_pass_int16():
    """Exhaustive over widths and signs: the worst pair of products against the limits of int16."""
    target = TARGETS["onnxruntime_cpu_no_vnni"]
    widths = range(2, 9)
    for bits, width, narrow, symmetric, signed in itertools.product(
        widths, widths, (False, True), (False, True), (False, True)
    ):
        weight = QuantSpec(bits, symmetric=symmetric, narrow=narrow, axis=0)
        activation = QuantSpec(width, signed=signed)
        corners = itertools.product(
            stored_codes(weight, activation=False), stored_codes(activation, activation=True)
        )
        sums = [2 * w * a for w, a in corners]
        expected = not (min(sums) >= -(2**15) and max(sums) <= 2**15 - 1)
        found = [f for f in lint(plan_of(weight, activation), target) if "cut off" in f.message]
        assert bool(found) == expected, (weight, activation)
        if width == 7 and not signed:
            assert not found  # what the message advises


def test_only_integer_kernels_saturate():
    target = TARGETS["onnxruntime_cpu_no_vnni"]
    plan = plan_of()
    plan.weights["a"] = replace(plan.weights["a"], source=None)
    wide = plan_of(activation=QuantSpec(16, signed=False))
    unsigned = plan_of(QuantSpec(8, signed=False, axis=0))  # uint8 by uint8 adds in int32
    for harmless in (plan, wide, unsigned):
        assert not [f for f in lint(harmless, target) if "cut off" in f.message]


def test_a_scale_for_each_output_of_a_transposed_convolution_is_on_axis_1():
    spec = replace(WEIGHT, axis=1)
    assert lint(plan_of(spec, op="conv_transpose2d"), TARGETS["generic"]) == []
    (finding,) = lint(plan_of(WEIGHT, op="conv_transpose2d"), TARGETS["generic"])
    assert finding.level == "error"
    assert lint(plan_of(spec, shape=(8, 1, 3, 3)), TARGETS["generic"]) == []  # a single input


def test_the_file_of_unsigned_activations():
    by_target = {
        name: [f.level for f in lint(plan_of(), target) if f.site == FILE]
        for name, target in TARGETS.items()
    }
    assert by_target.pop("tensorrt") == ["error"]
    assert by_target.pop("xnnpack") == ["warning"]
    assert set(map(tuple, by_target.values())) == {()}


@pytest.mark.parametrize(
    ("plan", "opset"),
    [
        (FORMATS["weight per tensor"], 10),
        (FORMATS["8-bit"], 13),
        (FORMATS["group weight"], 21),
        (FORMATS["wide"], 21),
    ],
)
def test_opset(plan, opset):
    assert needed_opset(plan) == opset
    target = replace(TARGETS["generic"], runtime="an old one", opset=13)
    found = [f"{f.level} {f.site}: {f.message}" for f in lint(plan, target)]
    assert len(found) == (opset == 21)
    assert all("error model.onnx: these formats need opset 21" in text for text in found)


def test_an_impossible_plan_is_one_sentence():
    plan = plan_of(activation=QuantSpec(8, symmetric=False), layers=2)
    with pytest.raises(GraphError, match="target=tensorrt, got 2 errors, first 'x': an affine"):
        check(plan, TARGETS["tensorrt"])
    assert check(plan, TARGETS["onnxruntime_cpu"]) == []


def test_sites_with_the_same_finding_share_a_line():
    plan = plan_of(replace(WEIGHT, bits=4), QuantSpec(4, signed=False), layers=3)
    lines = summary(lint(plan, TARGETS["onnxruntime_cpu"]))
    assert len(lines) == 2
    assert lines[0].startswith("warning: 'x': 4-bit activations are stored in 8 bits")
    assert lines[1].startswith("warning: 3 sites, first 'a.weight': 4-bit weights are stored")


def test_errors_come_first():
    plan = plan_of(replace(WEIGHT, bits=4, axis=1), QuantSpec(4))
    levels = [f.level for f in lint(plan, TARGETS["onnxruntime_cpu"])]
    assert levels == ["error", "warning", "warning"]


def test_unknown_target_names_close_ones():
    assert find_target("xnnpack").runtime == "XNNPACK"
    with pytest.raises(ConfigError, match="target=onnxruntime: did you mean onnxruntime_cpu"):
        find_target("onnxruntime")
    with pytest.raises(ConfigError, match="choose one of generic, "):
        find_target("q")


def small_net():
    layers = nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2))


def test_the_file_stores_what_the_lint_assumes():
    model, _ = folded(small_net(), make_scheme(4, 8), torch.randn(8, 4, 8, 8))
    integer = convert(model)
    layer = integer.get_submodule("2")
    assert layer.weight_codes.dtype is torch.int8  # pyright: ignore[reportAttributeAccessIssue]
    assert layer.weight_codes.abs().max() == 7 * 16  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    codec = integer.get_submodule("activations.input/input")
    assert (int(codec.zero_point), codec.zero_point.dtype) == (128, torch.uint8)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("options", "is_integer"),
    [
        ({"weight": {"symmetric": False, "narrow": False}}, True),
        ({"weight": {"group_size": 4}}, False),
        ({"weight_bits": 16}, False),
        ({"activation_bits": 16}, False),
    ],
    ids=["affine", "group", "wide-weight", "wide-activation"],
)
def test_onnxruntime_has_integer_kernels_where_the_table_says_so(options, is_integer, tmp_path):
    x = torch.randn(8, 4, 8, 8)
    model, plan = folded(small_net(), make_scheme(**options), x)
    export_onnx(convert(model), x[:2], tmp_path / "model.onnx")
    session = onnxruntime.SessionOptions()
    session.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session.log_severity_level = 3
    onnxruntime.InferenceSession(
        tmp_path / "model.onnx", session, providers=["CPUExecutionProvider"]
    )
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert ("Conv" not in kinds) == is_integer
    findings = lint(plan, TARGETS["onnxruntime_cpu"])
    assert (not any("no integer kernel" in f.message for f in findings)) == is_integer


@pytest.mark.parametrize(
    ("quantizer", "op", "said"),
    [
        ("dynamic_tensor", "linear", False),
        ("dynamic_tensor", "conv2d", True),
        ("dynamic", "linear", True),
        ("lsq", "conv2d", False),
    ],
)
def test_grids_that_come_with_the_values(quantizer, op, said):
    plan = plan_of(op=op)
    site = plan.activations["x"]
    plan.activations["x"] = replace(site, format=replace(site.format, quantizer=quantizer))
    found = [f.message for f in lint(plan, find_target("onnxruntime_cpu")) if "weight" in f.site]
    assert bool(found) == said
    assert all("quantizer=dynamic_tensor in front of linear layers" in m for m in found)
    assert not lint(plan, find_target("generic"))


def test_four_bits_name_the_file_that_stores_them():
    (found,) = lint(plan_of(replace(WEIGHT, bits=4)), find_target("onnxruntime_cpu"))
    assert "model.onnx with export.storage=size" in found.message
