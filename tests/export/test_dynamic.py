"""Linear layers whose input brings its grid: integer products in the file, code for code."""

from collections.abc import Callable
from functools import partial

import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from qat.export.onnx import export_onnx
from qat.export.onnx_file import write_onnx
from qat.export.packed import load_packed, save_packed
from qat.export.runtime import OnnxModel
from qat.export.verify import compare_sites
from qat.graph.convert import convert
from qat.models import build
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from qat.spec import Rule, Scheme
from tests.export.test_onnx import optimised_ops
from tests.helpers import folded, make_scheme

FLOATS = Rule("*", activation="float")
GRID = {
    "bits": 8,
    "signed": False,
    "symmetric": False,
    "quantizer": "dynamic_tensor",
    "observer": "min_max",
}
SCHEME = make_scheme(rules={"floats": FLOATS, "reads": Rule("@to:linear", activation=GRID)})
FUSED = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def matrices() -> tuple[nn.Module, torch.Tensor, int]:
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.Linear(24, 5)]
    return nn.Sequential(*layers), torch.randn(16, 12), 3


def language_model() -> tuple[nn.Module, torch.Tensor, int]:
    model = build("gpt", 256, context=12, width=16, depth=2, heads=2, tied=False)
    return model, torch.randint(0, 256, (16, 12)), 9


class Rearranged(nn.Module):
    """What a layer reads is turned and cut between its quantize and the product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.first(x).relu().transpose(1, 2)
        return self.second(turned.reshape(-1, 2, 12).flatten(1)[:, :12])


def rearranged() -> tuple[nn.Module, torch.Tensor, int]:
    return Rearranged(), torch.randn(16, 3, 6), 2


@pytest.fixture(
    scope="module", params=[matrices, language_model, rearranged], ids=lambda f: f.__name__
)
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    make: Callable[[], tuple[nn.Module, torch.Tensor, int]] = request.param
    model, x, layers = make()
    captured, _ = folded(model, SCHEME, x)
    converted = convert(captured)
    path = tmp_path_factory.mktemp("dynamic") / "m.onnx"
    sites = export_onnx(converted, x[:1], path)
    return captured, converted, x, layers, sites, path


def test_every_product_runs_on_integers(exported, tmp_path):
    *_, layers, _, path = exported
    ops = optimised_ops(path, tmp_path)
    assert sum(ops[name] for name in FUSED) == layers
    assert not ops["Gemm"] + ops["MatMulNBits"]


def test_codes_and_predictions_are_those_of_the_fold_stage(exported):
    captured, converted, x, _, sites, path = exported
    reference = IntegerRun(captured)(x)
    assert torch.equal(IntegerRun(converted)(x), reference)
    for optimise in (True, False):
        found = compare_sites(partial(IntegerRun, converted), path, sites, x, optimise=optimise)
        assert [site.site for site in found] == sites
        assert {site.largest for site in found} == {0}
        ours = OnnxModel(path, optimise=optimise)(x)
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_batches_bring_their_own_grids(exported):
    captured, _, x, _, _, path = exported
    for part in (x[:1], x[3:9]):
        torch.testing.assert_close(
            OnnxModel(path)(part), IntegerRun(captured)(part), rtol=1e-5, atol=1e-5
        )


def test_a_chip_lists_the_divisions(exported):
    _, converted, x, _, sites, _ = exported
    chip, reference = ChipRun(converted), IntegerRun(converted)(x)
    step = (reference.max() - reference.min()) / 255
    assert (chip(x) - reference).abs().max() < step
    assert list(chip.float_ops.values()).count("quantize_dynamic") == len(sites)


def test_packed_file_says_that_batches_bring_the_grid(exported, tmp_path):
    _, converted, x, _, sites, _ = exported
    path = tmp_path / "m.safetensors"
    save_packed(converted, x[:1], path, metadata={})
    _, header = load_packed(path)
    found = {site: form["dynamic"] for site, form in header["activations"].items()}
    assert found == dict.fromkeys(sites, "tensor")
    assert torch.equal(PackedModel(path)(x), IntegerRun(converted)(x))


@pytest.mark.parametrize("optimise", [True, False])
def test_a_fixed_grid_behind_a_brought_one(optimise, tmp_path):
    """The bias is no code of the sums, and yet all round once: file, reference and chip."""
    torch.manual_seed(0)
    fixed = {"quantizer": "uniform", "signed": True, "symmetric": True}
    rules = {**SCHEME.rules, "fixed": Rule("1", activation=fixed)}
    x = torch.randn(64, 12)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    captured, plan = folded(model, Scheme("mixed", rules), x)
    assert {s: a.format.quantizer for s, a in plan.activations.items()} == {
        "input.input": "dynamic_tensor",
        "1": "uniform",
    }
    converted = convert(captured)
    sites = export_onnx(converted, x[:1], tmp_path / "m.onnx")
    run = partial(IntegerRun, converted)
    found = compare_sites(run, tmp_path / "m.onnx", sites, x, optimise=optimise)
    assert {site.largest for site in found} == {0}
    step = IntegerRun(converted)(x).abs().max() / 255
    assert (ChipRun(converted)(x) - IntegerRun(converted)(x)).abs().max() < step


@pytest.mark.parametrize("form", ["Gemm", "Add"])
def test_the_workarounds_are_needed(form, tmp_path):
    """The runtime leaves a Gemm of dynamic codes in float, and makes one of product and Add."""
    torch.manual_seed(0)
    captured, _ = folded(nn.Sequential(nn.Linear(6, 4)), SCHEME, torch.randn(8, 6))
    path = tmp_path / "m.onnx"
    export_onnx(convert(captured), torch.randn(1, 6), path)
    proto = onnx.load(path)
    nodes = {node.op_type: node for node in proto.graph.node}
    turn, product, bias = (nodes[kind] for kind in ("Transpose", "MatMul", "Sum"))
    if form == "Add":
        bias.op_type = "Add"
    else:
        for node in (turn, product, bias):
            proto.graph.node.remove(node)
        inputs = [product.input[0], turn.input[0], bias.input[1]]
        proto.graph.node.append(helper.make_node("Gemm", inputs, list(bias.output), transB=1))
    write_onnx(path, proto)
    assert optimised_ops(path, tmp_path)["Gemm"] == 1
