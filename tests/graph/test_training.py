"""The graph of training for transformers and smooth activations: the same step, and less kept."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.fake_quant import fake_quants
from qat.functional import fused, kept
from qat.functional.fused import fused_kernels
from qat.graph.captured import make_function
from qat.graph.chains import Chain
from qat.graph.insert import prepare
from qat.graph.training import training_graph
from qat.training.compiled import training_forward
from tests.helpers import calibrate, kept_bytes, make_scheme, slow_but

LEARNED = {"quantizer": "lsq", "observer": "min_max"}
SMOOTH = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer-norm and in front of an addition."""

    def __init__(self, activation=SMOOTH["gelu"]):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.act, self.down = nn.Linear(16, 64), activation, nn.Linear(64, 16)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.3, -1)
        y = x + self.out(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        return y + self.down(self.act(self.up(self.norm2(y))))


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(6, 12, 16)


def prepared(x, block):
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    captured, _ = prepare(block, make_scheme(8, 8, weight=LEARNED, activation=LEARNED), x)
    calibrate(captured, x)
    return captured.train()


def smooth_chains(model):
    names = make_function(training_graph(model)).__globals__
    found = [value for value in names.values() if isinstance(value, Chain)]
    return sorted((type(c.norm).__name__, c.smooth) for c in found)


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_found(name, x):
    found = smooth_chains(prepared(x, Block(SMOOTH[name])))
    layer_norms = [("LayerNorm", ""), ("LayerNorm", "")]
    assert [chain for chain in found if chain[0] == "LayerNorm"] == layer_norms
    assert ("NoneType", name) in found


@pytest.mark.parametrize("name", slow_but(SMOOTH, "gelu", "hardswish"))
def test_a_step_is_that_of_the_parts(name, x):
    ours = prepared(x, Block(SMOOTH[name]))
    theirs = deepcopy(ours)
    upstream = torch.randn(6, 12, 16)
    forward = training_forward(ours, "regional")
    ys = [f(x) for f in (forward, theirs)]
    step = 2 * max(site.quantizer.scale.max().item() for site in fake_quants(theirs))
    assert (ys[0] != ys[1]).float().mean() < 0.05  # a value at a tie may take the code beside
    torch.testing.assert_close(*ys, rtol=0, atol=step)
    for y in ys:
        y.backward(upstream)
    for (parameter, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        distance = (a.grad - b.grad).norm() / b.grad.norm().clamp_min(1e-6)
        assert distance < 0.02, parameter


def test_functions_are_found_like_modules(x):
    class Functional(Block):
        def forward(self, x):
            return self.down(F.gelu(self.up(self.norm1(x)), approximate="tanh"))

    assert ("NoneType", "gelu_tanh") in smooth_chains(prepared(x, Functional()))


def test_less_is_kept_than_by_the_float_model(x):
    x = torch.randn(64, 12, 16, requires_grad=True)
    model = prepared(x.detach(), Block())
    forward = make_function(training_graph(model))
    ours = kept_bytes(model, x, lambda x: model.call(forward, x), kept._pack)
    floats = Block().train()
    theirs = kept_bytes(floats, x, floats, lambda t: t)
    assert ours < 0.85 * theirs


def test_floats_are_kept_where_they_are_made_and_nowhere_else(x):
    """Not as heads, transposed or copied: products and linear layers keep codes."""
    model, floats = prepared(x, Block()), {}
    forward = make_function(training_graph(model))
    parameters = {p.data_ptr() for p in model.parameters()}

    def look(t):
        packed = kept._pack(t)
        if packed is t and t.numel() >= x.numel() and t.data_ptr() not in parameters:
            floats[t.data_ptr()] = t  # alive: no address comes twice
        return packed

    with fused_kernels(), torch.autograd.graph.saved_tensors_hooks(look, kept._unpack):
        y = model.call(forward, x)
    assert y.grad_fn is not None
    assert sorted(tuple(t.shape) for t in floats.values()) == [
        (6, 2, 12, 8),  # of attention, in front of its grid
        (6, 2, 12, 12),  # of softmax
        (6, 12, 16),  # in front of the first layer-norm
        (6, 12, 16),  # and the second
        (6, 12, 48),  # queries, keys and values in front of their grid
        (6, 12, 64),  # in front of the activation function
    ]
