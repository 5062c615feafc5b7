import copy
import pickle

import pytest
import torch
from torch import nn

from qat.codecs import ActivationCodec, storage_type
from qat.fake_quant import FakeQuant, Phase, make_fake_quant
from qat.functional.codes import dequantize_codes, quantize_codes
from qat.integer_layers import IntegerLayer, convert_layer
from qat.layers import Links, QuantizedLayer, quantize_layer
from qat.spec import QuantSpec


def site(spec, low, high, *, shape=(1,), has_batch=True, quantizer="uniform") -> FakeQuant:
    quant = make_fake_quant(
        "site", spec, shape, quantizer=quantizer, observer="min_max", has_batch=has_batch
    )
    quant.quantizer.set_range(torch.as_tensor(low), torch.as_tensor(high))
    quant.calibrated = True
    quant.set_phase(Phase.QUANTIZE)
    return quant.eval()


def integer(layer, spec, source=None, *, inner=False) -> nn.Module:
    shape = tuple(layer.weight.shape)
    quant = make_fake_quant(
        "w", spec, shape, quantizer="uniform", observer="min_max", has_batch=False
    )
    quant.set_phase(Phase.OBSERVE)
    quant.train()(layer.weight)
    quant.finish_calibration()
    quant.set_phase(Phase.QUANTIZE)
    quant.eval()
    quantize_layer(layer, quant, Links(None, "late", source, inner))
    layer.folded = True
    twin = copy.deepcopy(layer)
    assert isinstance(twin, QuantizedLayer)
    convert_layer(twin)
    return twin


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (2, True, torch.int8), (8, True, torch.int8), (9, True, torch.int16),
        (16, True, torch.int16), (8, False, torch.uint8), (9, False, torch.uint16),
    ],
)  # fmt: skip
def test_storage(bits, signed, expected):
    assert storage_type(QuantSpec(bits, signed=signed), signed=signed) is expected


FORMATS = [
    QuantSpec(bits, signed=signed, symmetric=symmetric)
    for bits in (2, 4, 7, 8, 10, 16)
    for signed in (True, False)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_codecs_compute_what_the_fake_quant_computes(spec):
    quant = site(spec, 0.0 if spec.symmetric and not spec.signed else -1.3, 2.1)
    codec = ActivationCodec.of(quant)
    x = torch.cat([torch.randn(2000) * 2, torch.tensor([0.0, -1.3, 2.1, 1e6, -1e6])])
    assert torch.equal(codec(x), quant(x))
    codes = codec.codes(x)
    assert codes.dtype is (torch.uint8 if spec.bits <= 8 else torch.uint16)
    offset = 2 ** (8 * codes.dtype.itemsize - 1) if spec.signed else 0
    assert torch.equal(codes.int() - offset, quant.quantizer.codes(x).int())
    assert (codes.int().min(), codes.int().max()) == (spec.qmin + offset, spec.qmax + offset)
    assert codec(torch.zeros(1)) == 0


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_every_code_comes_back(spec):
    codec = ActivationCodec.of(site(spec, 0.0 if spec.symmetric and not spec.signed else -1.3, 2.1))
    codes = torch.arange(codec.qmin, codec.qmax + 1).to(codec.zero_point.dtype)
    values = dequantize_codes(codes, codec.scale, codec.zero_point, 0, 0)
    assert torch.equal(codec.codes(values).int(), codes.int())


@pytest.mark.parametrize("high", [None, 0.8, 6.0])
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_clipping_codes_is_clipping_values(spec, high):
    quant = site(spec, 0.0 if spec.symmetric and not spec.signed else -1.3, 2.1)
    codec = ActivationCodec.of(quant)
    codec.clip(0.0, high)
    x = torch.cat([torch.randn(4000) * 3, torch.tensor([0.8, 6.0, 2.1, 0.0])])
    assert torch.equal(codec(x), quant(x.clamp(0.0, high)))


@pytest.mark.parametrize(
    ("shape", "spec", "layout"),
    [
        ((4, 6), QuantSpec(8), ((), 0, 0)),
        ((4, 6), QuantSpec(8, axis=0), ((4,), 0, 0)),
        ((4, 6), QuantSpec(8, axis=1), ((6,), 1, 0)),
        ((1, 6), QuantSpec(8, axis=0), ((1,), 0, 0)),
        ((4, 6), QuantSpec(8, axis=0, group_size=3), ((4, 2), 1, 3)),
        ((4, 6), QuantSpec(8, axis=0, group_size=6), ((4,), 0, 0)),
        ((1, 6), QuantSpec(8, axis=0, group_size=2), ((1, 3), 1, 2)),
    ],
    ids=str,
)
def test_scales_are_laid_out_as_dequantize_linear_wants_them(shape, spec, layout):
    layer = integer(nn.Linear(shape[1], shape[0]), spec)
    assert isinstance(layer, IntegerLayer)
    assert (tuple(layer.weight_scale.shape), layer.axis, layer.block) == layout
    assert layer.weight_zero_point.shape == layer.weight_scale.shape
    assert layer.weight_zero_point.dtype == layer.weight_codes.dtype


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(4, axis=0, narrow=True), QuantSpec(4, axis=0, group_size=2), QuantSpec(8),
     QuantSpec(5, axis=0, symmetric=False), QuantSpec(12, axis=0),
     QuantSpec(8, axis=0, signed=False, symmetric=False)],
    ids=str,
)  # fmt: skip
def test_layers_compute_what_the_fold_stage_computes(spec):
    source = site(QuantSpec(8), -2.0, 2.0)
    layer = nn.Conv2d(4, 6, 3)
    twin = integer(layer, spec, source)
    x = source(torch.randn(2, 4, 8, 8))
    assert isinstance(twin, IntegerLayer)
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin(x), layer(x))
    assert twin.weight_codes.dtype is storage_type(spec, signed=spec.signed)
    assert (twin.bias_codes is None) is (spec.group_size is not None)
    assert not list(twin.parameters())
    assert type(twin).__bases__ == (IntegerLayer, nn.Conv2d)


@pytest.mark.parametrize(("quantizer", "parts"), [("uniform", 1), ("apot", 2)])
def test_a_layer_inside_a_module_quantizes_its_own_input(quantizer, parts):
    source = site(QuantSpec(4, signed=True), -2.0, 2.0, quantizer=quantizer)
    layer = nn.Linear(4, 3)
    twin = integer(layer, QuantSpec(8, axis=0), source, inner=True)
    x = torch.randn(50, 4) * 2
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin(x), twin(source(x)))
    codec = twin.get_submodule("input_codec")
    assert len([m for m in codec.modules() if not isinstance(m, nn.Sequential)]) == parts
    assert "input_codec" not in integer(nn.Linear(4, 3), QuantSpec(8), source)._modules


def test_bias_codes_are_on_the_grid_of_the_accumulator():
    source = site(QuantSpec(8), -2.0, 2.0)
    layer = nn.Linear(4, 3)
    bias = layer.bias.detach().clone()
    twin = integer(layer, QuantSpec(8, axis=0), source)
    assert isinstance(twin, IntegerLayer)
    assert twin.bias_codes is not None
    assert twin.bias_scale is not None
    assert torch.equal(twin.bias_scale, source.quantizer.scale * twin.weight_scale)
    expected = (bias.double() / twin.bias_scale.double()).round().int()
    assert torch.equal(twin.bias_codes, expected)
    assert (twin.bias - bias).abs().max() <= twin.bias_scale.max() / 2  # pyright: ignore[reportOptionalOperand]


def test_bias_is_real_without_an_integer_input():
    layer = nn.Linear(4, 3)
    bias = layer.bias.detach().clone()
    twin = integer(layer, QuantSpec(8, axis=0))
    assert isinstance(twin, IntegerLayer)
    assert twin.bias_codes is None
    assert torch.equal(twin.bias, bias)  # pyright: ignore[reportArgumentType]
    assert integer(nn.Linear(4, 3, bias=False), QuantSpec(8)).bias is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_layers_are_copied(clone):
    layer = integer(nn.Linear(4, 3), QuantSpec(4, axis=0))
    twin, x = clone(layer), torch.randn(5, 4)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))


def test_operators_agree_with_their_shapes_and_types():
    scale, zero = torch.tensor(0.1), torch.tensor(7, dtype=torch.uint8)
    x = torch.randn(3, 4)
    torch.library.opcheck(quantize_codes, (x, scale, zero, 0, 15), test_utils="test_faketensor")
    codes = quantize_codes(x, scale, zero, 0, 15)
    torch.library.opcheck(
        dequantize_codes, (codes, scale, zero, 0, 0), test_utils="test_faketensor"
    )
    assert codes.dtype is torch.uint8
    assert codes.max() <= 15


def test_blocks_repeat_their_scale():
    codes = torch.arange(12, dtype=torch.int8).view(2, 6)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    values = dequantize_codes(codes, scale, None, 1, 3)
    expected = codes.float() * scale.repeat_interleave(3, 1)
    assert torch.equal(values, expected)
    per_channel = dequantize_codes(codes, torch.arange(6.0), None, 1, 0)
    assert torch.equal(per_channel, codes * torch.arange(6.0))
