"""What layers make of their parameters in evaluation: once, the same, and never what is stale."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from qat.codecs import make_codec
from qat.fake_quant import activation_quants
from qat.graph.insert import prepare
from qat.held import hold
from qat.layers import QuantizedLayer, fold
from qat.reference.run import IntegerRun
from qat.training.evaluate import evaluate
from tests.helpers import calibrate, make_scheme

LEARNED = {"quantizer": "lsq", "observer": "min_max"}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture(params=["quantize", "fold"])
def model(request):
    torch.manual_seed(0)
    scheme = make_scheme(8, 8, weight=LEARNED, activation=LEARNED)
    captured, _ = prepare(Small(), scheme, torch.randn(4, 3, 8, 8))
    calibrate(captured, torch.randn(16, 3, 8, 8))
    if request.param == "fold":
        fold(captured)
    return captured.eval()


@pytest.fixture
def counted(model, monkeypatch):
    """How often weights are made, by layer."""
    calls = []
    for name in ("_training_weight", "_folded_weight", "_integer_weight"):
        make = getattr(QuantizedLayer, name)

        def count(layer, make=make, name=name):
            calls.append((name, layer))
            return make(layer)

        monkeypatch.setattr(QuantizedLayer, name, count)
    return calls


def test_evaluation_makes_each_weight_once_and_scores_the_same(model, counted):
    batches = list(zip(torch.randn(6, 4, 3, 8, 8), torch.randint(0, 5, (6, 4)), strict=True))
    found = evaluate(model, batches)
    assert len(counted) == len(set(counted)) == 2
    assert all(layer.held is None for _, layer in counted)
    assert found == evaluate(deepcopy(model), batches)


def test_what_changed_is_made_again(model):
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    with torch.no_grad(), hold(model):
        for layer in layers:
            neighbours = [layer, *layer.neighbours()]
            for read in (x for m in neighbours for x in (*m.parameters(), *m.buffers())):
                before = layer.weight
                assert layer.weight is before
                read.add_(0)
                assert layer.weight is not before
                assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("model", ["fold"], indirect=True)
def test_codecs_are_made_once_and_again_where_a_scale_changed(model, monkeypatch):
    made = []

    def count(fake_quant):
        made.append(fake_quant.site)
        return make_codec(fake_quant)

    monkeypatch.setattr("qat.reference.run.make_codec", count)
    sites = sorted(f.site for f in activation_quants(model))
    run, x = IntegerRun(model), torch.randn(4, 3, 8, 8)
    with hold(model):
        first = run(x)
        assert torch.equal(run(x), first)
        assert sorted(made) == sites
        for fake_quant in activation_quants(model):
            with torch.no_grad():
                for parameter in fake_quant.parameters():
                    parameter.mul_(2)
        assert not torch.equal(run(x), first)
        assert sorted(made) == sorted(2 * sites)
    run(x)
    run(x)
    assert sorted(made) == sorted(4 * sites)


def test_gradients_are_never_held(model, counted):
    layer = model.get_submodule("conv")
    with hold(model):
        with torch.no_grad():
            held = layer.weight
        made = layer.weight
    assert made.requires_grad
    assert torch.equal(made, held)
    with torch.no_grad():
        assert layer.weight is not held
    assert len([one for one in counted if one[0] != "_integer_weight"]) == 3


def test_nothing_is_held_behind_an_error(model):
    def fail():
        with hold(model), torch.inference_mode():
            assert head.weight is head.weight
            raise ZeroDivisionError

    head = model.get_submodule("head")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert "held" not in head.__dict__
