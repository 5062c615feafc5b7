"""Arguments that lend a size, a dtype, a device or an index have no grid and join none."""

import pytest
import torch
from torch import fx, nn

from qat.graph.convert import convert
from qat.graph.data_arguments import data_arguments
from qat.graph.insert import prepare
from qat.graph.op_names import FUNCTIONS, METHODS
from qat.graph.ops import ALL, LAYERS, OPS
from qat.graph.sites import Sites
from qat.reference.run import IntegerRun
from tests.helpers import calibrate, folded, make_scheme

CALLS = [("call_function", f) for f in FUNCTIONS] + [("call_method", name) for name in METHODS]


@pytest.mark.parametrize(("kind", "target"), CALLS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_what_only_lends_has_no_grid_and_joins_none(kind, target):
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("a", "b", "c", "d")]
    node = graph.create_node(kind, target, tuple(inputs))
    for made in (*inputs, node):
        made.meta["shape"] = (2, 3, 4)
    graph.output(graph.call_function(torch.matmul, (node, node)))
    sites = Sites(graph, {"": nn.Module()})
    count = OPS[sites.ops[node]].data
    lenders = set(inputs[count:])
    assert lenders or count == ALL
    assert set(data_arguments(node, sites.ops[node])) == set(inputs[:count])
    for root, group in sites.groups().items():
        assert not lenders & {root, *group.producers, *group.placed}
    assert len({sites.root(n) for n in lenders}) == len(lenders)
    assert all(sites.root(n) is not sites.root(node) for n in lenders)


def test_every_row_says_which_arguments_are_data():
    pairs = {*LAYERS, "matmul", "add", "mul", "embedding"}
    steps = {name for name, row in OPS.items() if row.decides}
    lent = {name for name, row in OPS.items() if row.data == 0}
    assert {name for name, row in OPS.items() if row.data == 2} == pairs | steps
    assert {"zeros_like", "new_zeros", "arange", "size", "input", "constant"} <= lent
    assert not any(OPS[n].reads_codes or OPS[n].passes or OPS[n].joins for n in lent | steps)
    assert {name for name, row in OPS.items() if row.data > 2} == {"einsum", "attention"}


def test_arguments_by_name():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    calls = {
        "add": graph.call_function(torch.add, (), {"other": b, "input": a}),
        "concat": graph.call_function(torch.cat, (), {"tensors": [a, b]}),
        "identity": graph.call_method("type_as", (a,), {"other": b}),
        "linear": graph.call_module("layer", (), {"x": a}),
    }
    found = {name: set(data_arguments(node, name)) for name, node in calls.items()}
    assert found["identity"] == found["linear"] == {a}
    assert found["add"] == found["concat"] == {a, b}


LENT = {
    "type_as": lambda y, x: y.type_as(x),
    "to": lambda y, x: y.to(x),
    "type": lambda y, x: y.type(x.dtype),
    "view_as": lambda y, x: y.view_as(x),
    "reshape_as": lambda y, x: y.flatten(1).reshape_as(x),
    "expand_as": lambda y, x: y[:, :1].expand_as(x[:, :1]) + 0 * y,
    "by name": lambda y, x: y.expand_as(other=x),
    "of a factory": lambda y, x: y + torch.zeros_like(x) + x.new_zeros(1),
    "of a mean": lambda y, x: y.type_as(x.mean(1)),
}


class Scaled(nn.Module):
    """A small branch beside a large one, as behind the norm of a language model."""

    def __init__(self, lend):
        super().__init__()
        self.lend = lend
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        large = self.a(x) * 100
        small = self.lend(self.b(torch.relu(x)), large)
        return self.c(small) + self.c(small * small)


@pytest.mark.parametrize("name", LENT)
def test_the_scale_of_a_tensor_is_not_that_of_what_it_is_shaped_like(name):
    torch.manual_seed(0)
    model, x = Scaled(LENT[name]).eval(), torch.randn(32, 8)
    captured, _ = prepare(model, make_scheme(), x[:2])
    calibrate(captured, x)
    with torch.no_grad():
        y, expected = captured(x), model(x)
    assert ((y - expected).square().mean() / expected.var()).item() < 1e-3


def test_codes_are_moved_by_the_shape_of_a_tensor_that_has_none():
    torch.manual_seed(0)
    captured, _ = folded(Scaled(LENT["reshape_as"]), make_scheme(), x := torch.randn(32, 8))
    run = IntegerRun(captured)
    y = run(x)
    assert "reshape" not in run.float_ops.values()
    assert torch.equal(IntegerRun(convert(captured))(x), y)
