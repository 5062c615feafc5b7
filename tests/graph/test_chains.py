"""Chains that training runs as one: what is found, that it computes the same, and what it keeps."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.batch_norm import batch_norms, freeze_batch_norm
from qat.fake_quant import Phase, fake_quants
from qat.functional import fused, kept
from qat.functional.chain import Running, live_norm
from qat.functional.fused import fused_kernels
from qat.graph.captured import make_function
from qat.graph.chains import Chain
from qat.graph.insert import prepare
from qat.graph.training import training_graph
from qat.layers import fold
from qat.training.compiled import training_forward
from tests.helpers import calibrate, kept_bytes, make_scheme, warm_up

LEARNED = {"quantizer": "lsq", "observer": "min_max"}
OBSERVED = {"quantizer": "uniform", "observer": "min_max"}


class Block(nn.Module):
    """Every form of chain: with and without an addition, with ReLU, with ReLU6, with neither."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.plain, self.act = nn.Conv2d(8, 12, 3), nn.ReLU()
        self.head = nn.Linear(12 * 36, 5)

    def forward(self, x):
        x = F.relu6(self.norm0(self.stem(x)))
        y = self.act(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)) + x)
        return self.head(F.relu(self.plain(y)).flatten(1))


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)


@pytest.fixture
def x():
    return torch.randn(6, 3, 8, 8)


def prepared(x, fields=LEARNED, bits=8):
    torch.manual_seed(0)
    model = warm_up(Block(), x)
    captured, _ = prepare(model, make_scheme(bits, bits, weight=fields, activation=fields), x)
    calibrate(captured, x)
    return captured.train()


def chains(model):
    names = make_function(training_graph(model)).__globals__
    return [value for value in names.values() if isinstance(value, Chain)]


def step(model, x, forward):
    y = forward(x)
    F.cross_entropy(y, torch.arange(len(x)) % 5).backward()
    return y


def test_what_is_found(x):
    found = [(c.norm is not None, c.clamp[1]) for c in chains(prepared(x))]
    inf = float("inf")
    assert sorted(found) == [(False, inf), (False, inf), (True, 6.0), (True, inf), (True, inf)]


def freeze_scales(model):
    for fake_quant in fake_quants(model):
        fake_quant.set_phase(Phase.FROZEN)


STAGES = {
    "live": lambda model: None,
    "frozen": freeze_batch_norm,
    "folded": lambda model: (freeze_batch_norm(model), fold(model)),
}


@pytest.mark.parametrize(
    "memory", [pytest.param(torch.contiguous_format, marks=pytest.mark.slow), torch.channels_last]
)
@pytest.mark.parametrize("fields", [LEARNED, OBSERVED], ids=["lsq", "uniform"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_that_of_the_parts(stage, fields, memory, x):
    ours = prepared(x, fields).to(memory_format=memory)
    freeze_scales(ours) if fields is OBSERVED else None
    STAGES[stage](ours)
    theirs = deepcopy(ours)
    ys = step(ours, x, training_forward(ours, "regional")), step(theirs, x, theirs)
    torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            size = b.grad.abs().max().item()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 + 1e-3 * size, msg=name)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_fold_stage_is_equal_bit_for_bit(x):
    model = prepared(x)
    freeze_batch_norm(model)
    fold(model)
    assert torch.equal(training_forward(model, "regional")(x), model(x))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_statistics_keep_small_variances_far_from_zero(memory):
    c = (torch.randn(8, 5, 7, 9) * 0.01 + 300).to(memory_format=memory)
    running = Running(torch.zeros(5), torch.ones(5), 0.25)
    with fused_kernels():
        channels = live_norm(c, None, None, 0.0, running).channels
    mean, exact = c.double().mean((0, 2, 3)), c.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(channels.mean.flatten().double(), mean, rtol=1e-6, atol=0)
    inverse = channels.inverse.flatten().double()
    torch.testing.assert_close(inverse, exact.rsqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(running.mean.double(), mean / 4, rtol=1e-6, atol=0)
    unbiased = c.double().var((0, 2, 3))
    torch.testing.assert_close(running.variance.double(), 0.75 + unbiased / 4, rtol=1e-5, atol=0)


def test_what_somebody_looks_at_is_computed_part_by_part(x):
    model = prepared(x)
    seen = []
    model.get_submodule("norm1").register_forward_hook(lambda *args: seen.append(args))
    training_forward(model, "regional")(x)
    assert len(seen) == 1


class InPlace(nn.Module):
    """A ReLU and an addition change what is read once more behind them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        y = self.one(x)
        z = self.two(self.relu(y))
        w = self.head(y)
        y += z
        return (self.head(y) + w).mean((2, 3))


def test_what_is_changed_in_place_is_left_alone(x):
    torch.manual_seed(0)
    scheme = make_scheme(8, 8, weight=LEARNED, activation=LEARNED)
    model, _ = prepare(InPlace(), scheme, x)
    calibrate(model, x)
    model.train()
    assert torch.equal(training_forward(model, "regional")(x), model(x))


def test_less_is_kept_than_by_the_float_model():
    x = torch.randn(64, 3, 8, 8)  # so that quantized weights, kept as they are, count little
    model = prepared(x)
    fused_forward = make_function(training_graph(model))
    ours = kept_bytes(model, x, lambda x: model.call(fused_forward, x), kept._pack)
    floats = Block().train()
    theirs = kept_bytes(floats, x, floats, lambda t: t)
    assert ours < 0.75 * theirs


def test_gradients_through_codes_are_those_of_values(x):
    a, b = prepared(x), prepared(x)
    forward = make_function(training_graph(b))
    step(a, x, training_forward(a, "regional"))
    with fused_kernels():
        y = b.call(forward, x)
    F.cross_entropy(y, torch.arange(len(x)) % 5).backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is None or (q.grad is not None and torch.equal(p.grad, q.grad))


def test_the_model_itself_is_not_changed(x):
    model = prepared(x)
    before = {mode: str(graph) for mode, graph in model.graphs.items()}
    training_graph(model)
    assert before == {mode: str(graph) for mode, graph in model.graphs.items()}
    assert len(batch_norms(model)) == 3
