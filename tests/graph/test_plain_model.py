"""Weights that are computed or of other types become plain float32, and compute the same."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from qat.errors import GraphError
from qat.export.onnx import export_onnx
from qat.export.runtime import OnnxModel
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.graph.preview import preview
from qat.layers import fold
from qat.models import load_checkpoint
from qat.reference.run import IntegerRun
from tests.helpers import calibrate, make_scheme


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.to(dtype)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


WAYS = {
    "weight_norm": lambda net: parametrizations.weight_norm(net.conv),
    "old weight_norm": lambda net: weight_norm(net.conv),
    "spectral_norm": lambda net: parametrizations.spectral_norm(net.conv),
    "old spectral_norm": lambda net: spectral_norm(net.fc),
    "orthogonal": lambda net: parametrizations.orthogonal(net.fc),
    "own": lambda net: parametrize.register_parametrization(net.fc, "weight", Symmetric()),
    "two": lambda net: parametrizations.spectral_norm(parametrizations.weight_norm(net.conv)),
    "bias": lambda net: prune.l1_unstructured(net.fc, "bias", 0.3),
    "frozen": lambda net: parametrizations.weight_norm(net.conv).requires_grad_(False),
}


def computed(way):
    torch.manual_seed(0)
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old forms are deprecated, and in use
        WAYS[way](net)
    net(torch.randn(2, 3, 8, 8))  # hooks then keep a weight with a gradient, which no copy may
    return net.eval()


@pytest.mark.parametrize("way", WAYS)
def test_computed_weight_becomes_a_plain_one_of_the_same_values(way):
    net, x = computed(way), torch.randn(4, 3, 8, 8)
    expected, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    captured, plan = prepare(net.train(), make_scheme(), x)
    assert torch.equal(captured.eval()(x), expected)
    names = {name for name, _ in captured.named_parameters()}
    assert {"conv.weight", "conv.bias", "fc.weight", "fc.bias"} <= names
    assert len(plan.notes) == 1
    assert "values are the same" in plan.notes[0]
    assert captured.get_parameter("conv.weight").requires_grad is (way != "frozen")
    assert [*net.state_dict()] == [*state]  # the user's model is what it was
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert torch.equal(net.eval()(x), expected)
    assert set(plan.weights) == {"conv", "fc"}


def test_checkpoint_of_a_computed_weight_is_loaded_under_its_own_names(tmp_path):
    x, trained = torch.randn(4, 3, 8, 8), computed("weight_norm")
    torch.save(trained.state_dict(), tmp_path / "net.pt")
    net = Net()
    parametrizations.weight_norm(net.conv)
    load_checkpoint(net, tmp_path / "net.pt")
    captured, _ = prepare(net, make_scheme(), x)
    assert torch.equal(captured.eval()(x), trained(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats_become_float32_as_if_by_hand(dtype, tmp_path):
    torch.manual_seed(0)
    net, x = Net(dtype), torch.randn(8, 3, 8, 8).to(dtype)
    captured, plan = prepare(net, make_scheme(), x[:2])
    by_hand, _ = prepare(net.float(), make_scheme(), x[:2].float())
    assert plan.notes == [f"weights and inputs of type {str(dtype)[6:]} were converted to float32"]
    for model, batch in ((captured, x), (by_hand, x.float())):
        calibrate(model, batch)
        fold(model)
    pairs = zip(captured.state_dict().items(), by_hand.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)
    assert torch.equal(captured(x), by_hand(x.float()))
    assert torch.equal(IntegerRun(captured)(x), IntegerRun(by_hand)(x.float()))
    if dtype is torch.float64:
        export_onnx(convert(captured), x[:1], tmp_path / "model.onnx")
        found = OnnxModel(tmp_path / "model.onnx")(x)
        assert torch.equal(found, IntegerRun(by_hand)(x.float()))


def test_models_of_several_types_become_one():
    x = torch.randn(2, 3, 8, 8)
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3).double())
    mixed[0].register_buffer("scale", torch.ones(2, dtype=torch.float16))
    plan = prepare(mixed, make_scheme(), x)[1]
    assert "type float16, float64 were" in plan.notes[0]
    assert preview(mixed, make_scheme(), x).plan.notes == plan.notes
    assert (mixed[0].scale.dtype, mixed[2].weight.dtype) == (torch.float16, torch.float64)


def test_a_type_that_stands_in_the_code_is_named():
    class Casts(Net):
        def forward(self, x):
            return super().forward(x.bfloat16())

    with pytest.raises(GraphError, match=r"test_plain_model\.py.* Its weights were converted"):
        prepare(Casts(torch.bfloat16), make_scheme(), torch.randn(2, 3, 8, 8))


def test_complex_weights_are_refused():
    net = Net()
    net.extra = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(GraphError, match=r"real numbers, got complex64 in 'extra'"):
        prepare(net, make_scheme(), torch.randn(2, 3, 8, 8))
