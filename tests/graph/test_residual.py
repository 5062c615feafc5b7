"""Additions that read more bits than layers: planned, inserted, converted, and on a chip."""

import pytest
import torch
from torch import nn

from qat.codecs import ActivationCodec
from qat.fake_quant import activation_quants
from qat.graph.captured import MODES
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.graph.plan import Branch
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from qat.spec import Rule
from tests.helpers import folded, make_scheme, warm_up

SUMS = {"sums": Rule("@to:add", None, {"bits": 8})}


class Block(nn.Module):
    """A stem, a max-pool perhaps, and a block whose shortcut is what its layer reads."""

    def __init__(self, *, pool: bool = False) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.stem(x).relu())
        x = (self.norm(self.conv(x)) + x).relu()
        return self.fc(x.mean((2, 3)))


def images():
    return torch.randn(8, 3, 8, 8)


def bits_of(plan):
    return {name: site.format.spec.bits for name, site in plan.activations.items()}


@pytest.mark.parametrize("pool", [False, True])
def test_additions_read_their_own_bits_and_layers_theirs(pool):
    captured, plan = prepare(Block(pool=pool), make_scheme(2, 2, rules=SUMS), images())
    assert plan.weights["conv"].source == "relu"
    found = bits_of(plan)
    assert (found["relu"], found["relu.residual"], found["norm"]) == (2, 8, 8)
    assert found["relu_2"] == 2
    assert str(plan.activations["relu.residual"].format.spec) == "u8"
    for mode in MODES:
        graph = captured.graphs[mode]
        (narrow,) = [n for n in graph.nodes if n.target == "activations.relu"]
        (conv,) = [n for n in graph.nodes if n.target == "conv"]
        (add,) = [n for n in graph.nodes if n.name.startswith("add")]
        assert list(narrow.users) == [conv]
        assert add.all_input_nodes[1].all_input_nodes[0].target == "activations.relu/residual"
        assert narrow.args[0] is add.all_input_nodes[1]
    placed = plan.branches["eval"]
    assert [*placed.values()] == [Branch("relu", ("conv",))]


def test_one_site_serves_all_where_bits_are_the_same_or_layers_have_more():
    _, plan = prepare(Block(), make_scheme(4, 8, rules=SUMS), images())
    assert "relu.residual" not in plan.activations
    assert plan.branches == {mode: {} for mode in MODES}
    rules = {"sums": Rule("@to:add", None, {"bits": 4}), "layers": Rule("@conv2d", {"bits": 8})}
    _, plan = prepare(Block(), make_scheme(8, 8, rules=rules), images())
    assert bits_of(plan)["relu"] == 4  # the last rule that matches any reader
    assert "relu.residual" not in plan.activations


class Taken(Block):
    """A block with a layer that has the name of a site."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ModuleDict({"residual": nn.Conv2d(3, 3, 1)})

    def forward(self, x):
        return super().forward(self.relu["residual"](x))


def test_a_name_that_is_taken_is_numbered():
    _, plan = prepare(Taken(), make_scheme(2, 2, rules=SUMS), images())
    assert bits_of(plan)["relu.residual_2"] == 8
    assert "relu.residual" in plan.weights


@pytest.mark.parametrize("pool", [False, True])
def test_what_is_shipped_is_rounded_twice_as_in_training(pool):
    torch.manual_seed(1)
    x = images()
    model = warm_up(Block(pool=pool), x)
    captured, _ = folded(model, make_scheme(4, 2, rules=SUMS), x)
    converted = convert(captured)
    seen = {}

    def watch(grid: ActivationCodec, codes):
        seen.setdefault(grid.site, []).append((grid, codes))
        return codes

    expected = IntegerRun(captured)(x)
    assert torch.equal(expected, IntegerRun(converted, watch)(x))
    assert len(seen["relu.residual"]) == 1 + pool  # once more, to the same codes, behind the pool
    wide, codes = seen["relu.residual"][-1]
    ((narrow, found),) = seen["relu"]
    real = codes * wide.scale  # unsigned: zero point 0
    assert torch.equal(found, (real / narrow.scale).round().clamp(0, 3))
    assert len(found.unique()) == 4


def test_a_chip_rescales_every_code_exactly():
    x = images()
    rules = {"sums": Rule("@to:add", None, {"bits": 8, "power_of_two": True})}
    shifts = {"power_of_two": True}
    scheme = make_scheme(4, 2, activation=shifts, rules=rules)
    captured, _ = folded(warm_up(Block(), x), scheme, x)
    scales = {f.site: f.quantizer.scale for f in activation_quants(captured)}
    ratio = scales["relu.residual"] / scales["relu"]
    assert float(ratio.log2()) % 1 == 0
    found = {}
    chip = ChipRun(captured, lambda grid, codes: found.setdefault(grid.site, codes))
    chip(x)
    assert not {k for k, v in chip.float_ops.items() if "relu" in k or "activations" in k}
    steps = found["relu.residual"].double() * ratio.double()
    assert torch.equal(found["relu"].double(), (steps + 0.5).floor().clamp(0, 3))
    assert found["relu"].unique().tolist() == [0, 1, 2]  # a scale of 2**n reaches beyond the data
