"""Options of the integer grid: how it rounds, and what the gradient of that is."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qat.errors import SpecError
from qat.fake_quant import make_fake_quant
from qat.functional.affine import dequantize
from qat.functional.estimators import dsq, ewgs
from qat.functional.fake_quantize import fake_quantize
from qat.graph.convert import convert
from qat.layers import quantized_layers
from qat.quantizers import QUANTIZERS
from qat.quantizers.grid import DELTA, SOFTNESS
from qat.spec import QuantSpec
from tests.helpers import calibrate, folded, make_scheme, warm_up

WORDS = ["lsq", "uniform"]
SPECS = [QuantSpec(3), QuantSpec(4, axis=0), QuantSpec(4, signed=False, symmetric=False)]
SHAPE = (3, 200)


def make(word, spec, *, has_batch=False, **options) -> Any:
    shape = spec.scale_shape(SHAPE)
    quantizer = QUANTIZERS[word](spec, shape, has_batch=has_batch, **options)
    quantizer.set_range(torch.full(shape, -0.9), torch.full(shape, 0.7))
    return quantizer


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("word", WORDS)
def test_stochastic_rounding_is_for_training_alone(word, spec):
    quantizer, x = make(word, spec, rounding="stochastic", has_batch=True), torch.randn(SHAPE)
    plain = make(word, spec)
    exact, step = plain(x), quantizer.scale.detach()
    a, b = quantizer(x), quantizer(x)
    assert not torch.equal(a, b)
    assert ((a - exact).abs() <= step * 1.001).all()
    assert torch.equal(quantizer.codes(x), plain.codes(x))
    quantizer.eval()
    assert torch.equal(quantizer(x), exact)


def test_stochastic_gradient_of_the_scale_is_that_of_what_was_drawn():
    """LSQ eq. 3 with the drawn code in place of the nearest."""
    spec, x = QuantSpec(3), (torch.arange(-60, 61) / 16).requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    drawn = []

    def rounding(steps):
        drawn.append(steps.floor() + (torch.rand_like(steps) < 0.5))
        return drawn[-1]

    y = fake_quantize(x, scale, torch.tensor(0.0), spec, rounding=rounding)
    upstream = torch.randint(-2, 3, x.shape).float()
    y.backward(upstream)
    assert len(drawn) == 1
    v, code = (x.detach() / 0.5).numpy(), drawn[0].numpy()
    inside = (v >= -4) & (v <= 3)
    slope = np.where(inside, code - v, np.clip(v, -4, 3))
    assert scale.grad == float((upstream.numpy() * slope).sum())
    assert torch.equal(x.grad, upstream * torch.tensor(inside))
    assert np.array_equal(y.detach().numpy(), np.clip(code, -4, 3) * 0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("word", WORDS)
def test_floor_rounds_down_everywhere(word, spec, training):
    quantizer, x = make(word, spec, rounding="floor").train(training), torch.randn(SHAPE)
    scale, zero = quantizer.scale.detach(), quantizer.zero_point
    expected = ((x / scale).floor() + zero).clamp(spec.qmin, spec.qmax)
    assert torch.equal(quantizer.codes(x), expected)
    assert torch.equal(quantizer(x), dequantize(expected, scale, zero))
    assert not torch.equal(quantizer(x), make(word, spec)(x))


@pytest.mark.parametrize("word", WORDS)
def test_floor_is_refused_on_activations(word):
    with pytest.raises(SpecError, match=r"site 'relu': expected rounding 'floor' on weights alone"):
        make_fake_quant(
            "relu",
            QuantSpec(4),
            (4, 10),
            quantizer=word,
            observer="min_max",
            has_batch=True,
            options={"rounding": "floor"},
        )


@pytest.mark.parametrize("gradient", ["ewgs", "dsq"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("word", WORDS)
def test_gradient_is_the_estimators(word, spec, gradient):
    x, upstream = torch.randn(SHAPE), torch.randn(SHAPE)
    grads, values = [], []
    quantizer = make(word, spec, gradient=gradient)
    scale, zero = quantizer.scale.detach(), quantizer.zero_point
    estimate = dsq(SOFTNESS) if gradient == "dsq" else ewgs(DELTA, spec.qmax - spec.qmin)
    for forward in (
        quantizer,
        lambda x: fake_quantize(x, scale, zero, spec, estimate=estimate),
        make(word, spec),
    ):
        leaf = x.clone().requires_grad_()
        values.append(forward(leaf))
        values[-1].backward(upstream)
        grads.append(leaf.grad)
    assert torch.equal(values[0], values[2])
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
def test_options_of_a_rule_reach_the_integers(batch_norm):
    """Floored weights are deployed as floored; stochastic activations as nearest."""
    x = torch.randn(8, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    warm_up(model, x)
    weight = {"quantizer": {"name": "lsq", "rounding": "floor", "gradient": "ewgs"}}
    activation = {"quantizer": {"name": "uniform", "rounding": "stochastic"}}
    options: Any = {"weight": weight, "activation": activation, "batch_norm": batch_norm}
    captured, _ = folded(model, make_scheme(4, 4, **options), x)
    layers = [layer for _, layer in quantized_layers(captured)]
    last = layers[-1]
    scale = last.weight_quant.quantizer.scale.detach()
    codes = (last.raw_weight / scale).floor().clamp(last.spec.qmin, last.spec.qmax)
    assert torch.equal(last.integers().weight / last.spec.storage_gain, codes)
    torch.testing.assert_close(convert(captured)(x), captured(x), rtol=0, atol=1e-5)
    captured.train()
    assert not torch.equal(captured(x), captured(x))
    calibrate(captured, x)  # ends in eval mode
    assert torch.equal(captured(x), captured(x))


@pytest.mark.parametrize("options", [{"rounding": "up"}, {"gradient": "tanh"}])
def test_unknown_words_are_errors(options):
    (name,) = options
    with pytest.raises(SpecError, match=rf"expected {name} to be one of \[.*\], got"):
        make("lsq", QuantSpec(4), **options)


@pytest.mark.parametrize("word", ["lsq_plus", "ewgs", "dsq"])
def test_methods_that_fix_rounding_and_gradient_take_no_such_option(word):
    with pytest.raises(SpecError, match=f"options that quantizer '{word}' takes"):
        make_fake_quant(
            "w",
            QuantSpec(4),
            SHAPE,
            quantizer=word,
            observer="min_max",
            has_batch=False,
            options={"rounding": "floor"},
        )
