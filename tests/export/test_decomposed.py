"""The dialect of PyTorch's integer back ends: layers with a form in it, and what it computes."""

import importlib
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from qat.export.decomposed import decompose, float_layers
from qat.graph.convert import convert
from qat.integer_layers import IntegerLayer
from qat.spec import Rule
from tests.graph.test_convert import make
from tests.helpers import folded, make_scheme, warm_up

needs_operators = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao, which brings the operators, is not installed"
)


def converted(net, scheme, seed=0):
    model, x = make(net, seed=seed) if isinstance(net, str) else (net, torch.randn(16, 4, 8, 8))
    captured, _ = folded(warm_up(model, x), scheme, x)
    return convert(captured), x


@pytest.mark.parametrize("net", ["conv", "depthwise", "grouped", "linear", "relu6", "signed"])
def test_layers_with_an_integer_form(net):
    assert float_layers(converted(net, make_scheme(4, 4))[0]) == {}


@pytest.mark.parametrize(
    ("net", "scheme", "reason"),
    [
        ("conv", make_scheme(16), "weights of 16 bits, stored as int16"),
        ("conv", make_scheme(weight={"symmetric": False, "narrow": False}), "another zero point"),
        ("conv", make_scheme(4, weight={"group_size": 2}), "several weight scales"),
        ("conv", make_scheme(8, 12), "an input of 12 bits at site 'input.input'"),
        ("linear", make_scheme(activation={"quantizer": "dynamic"}), "found at run time"),
        ("conv1d", make_scheme(), "there is no integer Conv1d"),
        ("conv3d", make_scheme(), "there is no integer Conv3d"),
        ("transposed", make_scheme(), "there is no integer ConvTranspose2d"),
        (
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")),
            make_scheme(),
            "padding_mode=reflect",
        ),
        ("conv", make_scheme(rules={"f": Rule("*", None, "float")}), "that is not quantized"),
    ],
)
def test_layers_without_one_say_why(net, scheme, reason):
    name, found = next(iter(float_layers(converted(net, scheme)[0]).items()))
    assert name == "0"
    assert reason in found


@needs_operators
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("net", ["conv", "depthwise", "relu6", "signed", "linear", "transposed"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_values_are_the_converted_models(net, bits, signed):
    importlib.import_module("torchao.quantization.pt2e")  # registers the operators

    model, x = converted(net, make_scheme(*bits))
    other = decompose(model, signed=signed)
    assert not [m for m in other.modules() if isinstance(m, IntegerLayer)]
    gap = (other(x) - model(x)).abs().max() / (model(x).max() - model(x).min())
    assert gap < 0.02 if bits == (8, 8) else gap < 0.15  # a code at a tie turns: x / s or x * (1/s)
    assert torch.equal(model(x), converted(net, make_scheme(*bits))[0](x))  # unchanged
