"""Which layer is joined with the fake-quant of the network's input, and which are large."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.functional import convolution, fused
from qat.graph import convolutions
from qat.graph.convolutions import FirstLayer, LargeLayer
from qat.graph.insert import prepare
from qat.graph.training import training_graph
from qat.training.compiled import training_forward
from tests.helpers import calibrate, make_scheme

LEARNED = {"quantizer": "lsq", "observer": "min_max"}


class Patches(nn.Module):
    """Asks the input for its size, as vision transformers do."""

    def __init__(self, **options):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4, **options), nn.Linear(32, 5)

    def forward(self, x):
        n, _, h, w = x.shape
        return self.head(self.patch(x).reshape(n, 8 * (h // 4) * (w // 4)))


class Standardised(nn.Conv2d):
    """Computes something of its own with its weight."""

    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class Other(Patches):
    def __init__(self):
        super().__init__()
        self.patch = Standardised(3, 8, 4, 4)


class Twice(nn.Module):
    """Reads the input once more."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Conv2d(3, 4, 3) for _ in range(2))

    def forward(self, x):
        return (self.one(x) + self.two(x)).mean((2, 3))


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)


def prepared(model, x, fields=LEARNED):
    captured, _ = prepare(model, make_scheme(8, 8, weight=fields, activation=fields), x)
    calibrate(captured, x)
    return captured.train()


def first_layers(model):
    nodes = training_graph(model).nodes
    return [node.target for node in nodes if isinstance(node.target, FirstLayer)]


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (Patches(), 1),
        (Patches(bias=False), 1),
        (Patches(padding_mode="reflect", padding=0), 0),
        (Patches(padding="valid"), 0),
        (Twice(), 0),
        (Other(), 0),
    ],
)
def test_what_is_found(model, count):
    assert len(first_layers(prepared(model, torch.randn(4, 3, 8, 8)))) == count


class Large(nn.Module):
    """A convolution with 1,152 weights, one with 256 in groups, and one of a class of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.large = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, bias=False)
        self.grouped, self.own = nn.Conv2d(16, 16, 2, groups=4), Standardised(16, 16, 3)

    def forward(self, x):
        return self.own(self.grouped(self.large(self.first(x)).relu())).mean((2, 3))


def prepared_large(monkeypatch, x):
    for module in (convolution, convolutions):
        monkeypatch.setattr(module, "LARGE", 1025)
    return prepared(Large(), x)


def test_large_weights_are_found(monkeypatch):
    model = prepared_large(monkeypatch, torch.randn(2, 3, 12, 12))
    found = [n.target for n in training_graph(model).nodes if isinstance(n.target, LargeLayer)]
    assert [one.layer for one in found] == [model.large]


@pytest.mark.parametrize("checkpointing", ["off", 2])  # the second of two is kept
def test_a_step_with_large_weights_is_the_same_to_the_bit(monkeypatch, checkpointing):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    ours = prepared_large(monkeypatch, x)
    step, found = training_forward(ours, "regional", checkpointing), []
    for largest in (1025, 2**20):  # in that order: the graph is made, and asks again
        monkeypatch.setattr(convolution, "LARGE", largest)
        y = step(x)
        assert ("_OneByOne" in names_of(y.grad_fn)) == (largest == 1025)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(ours.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def names_of(node):
    """Return the names of all functions behind ``node``."""
    names, todo = set(), [node]
    while todo:
        one = todo.pop()
        if one is not None and one not in names:
            names.add(one)
            todo += [parent for parent, _ in one.next_functions]
    return " ".join(one.name() for one in names)


def test_a_large_layer_that_somebody_looks_at_runs_as_it_is(monkeypatch):
    x, seen = torch.randn(2, 3, 12, 12), []
    model = prepared_large(monkeypatch, x)
    model.get_submodule("large").register_forward_hook(lambda *args: seen.append(args))
    y = training_forward(model, "regional")(x)
    assert len(seen) == 1
    assert "_OneByOne" not in names_of(y.grad_fn)


@pytest.mark.parametrize("made", [Patches, Other])
def test_a_step_is_that_of_the_parts(made):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    ours = prepared(made(), x)
    theirs = deepcopy(ours)
    labels = torch.arange(6) % 5
    ys = training_forward(ours, "regional")(x), theirs(x)
    torch.testing.assert_close(*ys, rtol=1e-5, atol=1e-5)
    found, expected = (
        torch.autograd.grad(F.cross_entropy(y, labels), list(model.parameters()))
        for y, model in zip(ys, (ours, theirs), strict=True)
    )
    for (name, _), a, b in zip(ours.named_parameters(), found, expected, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * size + 1e-7, msg=name)


@pytest.mark.parametrize("place", ["patch", "activations.input/x"])
def test_what_somebody_looks_at_is_computed_part_by_part(place):
    x = torch.randn(4, 3, 8, 8)
    model, seen = prepared(Patches(), x), []
    model.get_submodule(place).register_forward_hook(lambda *args: seen.append(args))
    training_forward(model, "regional")(x)
    assert len(seen) == 1
