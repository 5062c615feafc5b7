"""What becomes an id, a mask or another decision is read before it is quantized."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.export.onnx import export_onnx
from qat.export.packed import save_packed
from qat.export.runtime import OnnxModel
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from tests.helpers import calibrate, folded, make_scheme

CATEGORIES = 40


def table(count):
    """Categories in columns 0 and 5, zeros among those between."""
    ids = torch.randint(0, CATEGORIES, (count, 2)).float()
    values = torch.randn(count, 4) * (torch.rand(count, 4) > 0.3)
    return torch.cat([ids[:, :1], values, ids[:, 1:]], 1)


class Looks(nn.Module):
    """A model that returns what it decided, too."""

    def __init__(self, decide):
        super().__init__()
        self.decide = decide
        self.table = nn.Embedding(200, 8)
        self.embed, self.first = nn.Linear(12, 8), nn.Linear(4, 8)
        self.last = nn.Linear(16, 3)
        self.edges = nn.Buffer(torch.linspace(-2, 2, 30))

    def forward(self, x):
        ids = self.decide(self, x)
        row = self.table(ids.long().reshape(x.size(0), -1)[:, 0] % 200)
        both = torch.cat([row, x[:, 1:5]], 1)
        rest = F.relu(self.first(x[:, 1:5]))
        return self.last(torch.cat([F.relu(self.embed(both)), rest], 1)), ids


def of_parts(m, x):
    first, _, last = x.split([1, 4, 1], 1)
    return (first + 40 * last).round().long()


def of_a_loop(m, x):
    return torch.stack([x[:, k].to(torch.int64) for k in (0, 5)], 1)


DECISIONS = {
    "long": lambda m, x: x[:, 0].long(),
    "int": lambda m, x: x[:, 5].int(),
    "type": lambda m, x: x[:, :1].type(torch.long),
    "loop": of_a_loop,
    "split": of_parts,
    "scaled": lambda m, x: (x[:, 0] / 40 * 39).round().long(),
    "sum that is data": lambda m, x: (x[:, 1] + x[:, 2]).mul(10).floor().add(50).long(),
    "floor": lambda m, x: torch.floor(x[:, 1] * 3 + 20),
    "nonzero": lambda m, x: (x[:, 1:3] != 0).any(1),
    "mask": lambda m, x: x[:, 1:5] > 0.02,
    "argmax": lambda m, x: x[:, 1:5].argmax(1),
    "argsort": lambda m, x: x[:, 1:5].argsort(1),
    "topk": lambda m, x: x[:, 1:5].topk(2, 1)[1],
    "bucketize": lambda m, x: torch.bucketize(x[:, 1].contiguous(), m.edges),
    "one-hot": lambda m, x: F.one_hot(x[:, 0].long(), CATEGORIES).float().argmax(1),
    "average": lambda m, x: F.avg_pool1d(x[:, None, 1:5], 2).flatten(1) > 0.1,
    "products": lambda m, x: (x @ x.t()).argmax(1),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions_are_those_of_the_float_model(name):
    torch.manual_seed(0)
    model, x = Looks(DECISIONS[name]).eval(), table(64)
    captured, _ = prepare(model, make_scheme(), x if name == "products" else x[:2])
    calibrate(captured, x)
    with torch.no_grad():
        (y, ids), (expected, right) = captured(x), model(x)
    assert torch.equal(ids, right)
    assert ids.double().var() > 0
    error = ((y - expected).square().mean() / expected.var()).item()
    assert error < 2e-3


def test_every_form_decides_alike(tmp_path):
    def all_of_them(m, x):
        parts = [DECISIONS[k](m, x).long() for k in ("long", "type", "split", "mask", "argsort")]
        return torch.cat([p.reshape(x.size(0), -1) for p in parts], 1)

    torch.manual_seed(0)
    model, x = Looks(all_of_them).eval(), table(64)
    captured, plan = folded(model, make_scheme(), x)
    assert plan.float_share == 0
    converted = convert(captured)
    logits, ids = IntegerRun(captured)(x)
    assert torch.equal(ids, model(x)[1])
    export_onnx(converted, x[:1], tmp_path / "model.onnx")
    save_packed(converted, x[:1], tmp_path / "model.safetensors", metadata={})
    packed = PackedModel(tmp_path / "model.safetensors")
    found = OnnxModel(tmp_path / "model.onnx")(x)
    assert torch.equal(found if isinstance(found, torch.Tensor) else found[0], logits)
    for run in (IntegerRun(converted), packed):
        assert all(map(torch.equal, run(x), (logits, ids)))
    assert torch.equal(ChipRun(converted)(x)[1], ids)


def filled(x):
    y = torch.zeros(x.size(0), 6)
    y[:, :1], y[:, 5] = x[:, :1], x[:, 5]
    return y, x


def filled_like(x):
    y = torch.zeros_like(x)
    y[:, :4] = x[:, :4]
    return y, y


def copied(x):
    y = torch.empty_like(x).copy_(x)
    y.copy_(x + 1)
    return y, y


def changed(x):
    y = x.clone()
    y[:, 0] = x[:, 5]
    return y, y


def floored(x):
    y = x.clone()
    y.floor_()
    return y, y


def changed_as_a_view(x):
    y = x.clone()
    part = y[:, :2]
    part.mul_(0.5)
    return y, y


class Written(nn.Module):
    """Ids and data of a tensor that is written into in place."""

    def __init__(self, write):
        super().__init__()
        self.write, self.table = write, nn.Embedding(200, 4)
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        decided, data = self.write(x)
        ids = decided[:, 0].long()
        return self.a(x) + self.table(ids) * self.b(data).sum(1, keepdim=True), ids


WRITES = [filled, filled_like, copied, changed, floored, changed_as_a_view]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_what_is_written_into_a_tensor_takes_part_in_its_decisions(write):
    torch.manual_seed(0)
    model, x = Written(write).eval(), table(64)
    captured, _ = folded(model, make_scheme(), x)
    with torch.no_grad():
        expected, right = model(x)
    for run in (captured, IntegerRun(captured), IntegerRun(convert(captured))):
        y, ids = run(x)
        assert torch.equal(ids, right)
        assert ((y - expected).square().mean() / expected.var()).item() < 1e-3


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.c(self.b(y) * (y > 0.1).float())


def test_what_a_kernel_makes_is_decided_on_as_codes():
    captured, plan = prepare(Masked(), make_scheme(), torch.randn(2, 2, 8, 8))
    assert not any(plan.exact.values())  # the kernel of `a` rounds to codes: nothing else exists
    (mask,) = [n for n in captured.graphs["eval"].nodes if n.name == "gt"]
    assert str(mask.args[0].target) == "activations.relu"
    assert set(plan.activations) == {"input.x", "relu", "b", "identity", "mul"}


class Routed(nn.Module):
    """One expert for each sample, as the softmax of a router chooses."""

    def __init__(self):
        super().__init__()
        self.stem, self.router, self.last = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(16, 3)
        self.experts = nn.Embedding(8, 16)

    def forward(self, x):
        h = F.relu(self.stem(x))
        shares = self.router(h).softmax(-1)
        return self.last(self.experts(shares.argmax(-1)) * h * shares.max(-1, keepdim=True)[0])


def test_a_route_is_chosen_by_unquantized_shares():
    captured, _ = prepare(Routed(), make_scheme(8, 3), torch.randn(2, 6))
    nodes = {n.name: n for n in captured.graphs["eval"].nodes}
    assert nodes["argmax"].args[0].name == nodes["max_1"].args[0].name == "softmax"
    (weight,) = [n for n in nodes.values() if n.name == "mul_1"]
    assert all(str(n.target).startswith("activations.") for n in weight.args)


class Whole(nn.Module):
    def forward(self, x):
        ids = x[:, 0].long()
        return ids * 0 if ids.sum() < 0 else ids


def test_a_module_left_whole_reads_unquantized():
    torch.manual_seed(0)
    model = Looks(lambda m, x: m.whole(x)).eval()
    model.whole = Whole()
    x = table(64)
    captured, _ = prepare(model, make_scheme(), x[:2])
    assert captured.leaves == ["whole"]
    calibrate(captured, x)
    assert torch.equal(captured(x)[1], model(x)[1])
