import pytest
import torch

from qat.codecs import DynamicCodec, make_codec
from qat.errors import SpecError
from qat.fake_quant import Phase, make_fake_quant
from qat.functional.dynamic import token_scale
from qat.quantizers import QUANTIZERS, Dynamic
from qat.spec import QuantSpec

SPEC = QuantSpec(8)


def dynamic(spec=SPEC):
    return Dynamic(spec, (), has_batch=True)


def calibrated_site(quantizer="dynamic", spec=SPEC):
    quant = make_fake_quant(
        "site", spec, (4, 6), quantizer=quantizer, observer="min_max", has_batch=True
    )
    quant.set_phase(Phase.OBSERVE)
    quant.train()(torch.randn(4, 6))
    quant.finish_calibration()
    quant.set_phase(Phase.QUANTIZE)
    return quant


def test_every_row_has_the_scale_of_its_largest_value():
    x = torch.tensor([[[1.0, -127.0], [0.5, 0.25]], [[0.0, 0.0], [-3.0, 2.0]]])
    expected = torch.tensor([[[1.0], [0.5 / 127]], [[2.0**-26], [3 / 127]]])
    assert torch.equal(token_scale(x, 127), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_of_the_grid_comes_back(bits):
    spec = QuantSpec(bits)
    codes = torch.arange(-spec.qmax, spec.qmax + 1.0)
    scales = torch.tensor([[2.0**-7], [1.0], [2.0**9]])
    assert torch.equal(dynamic(spec).codes(codes * scales), codes.expand(3, -1))
    assert torch.equal(dynamic(spec)(codes * scales), codes * scales)


def test_rows_do_not_look_at_each_other():
    x = torch.randn(5, 7, 16)
    louder = torch.cat([x[:1], 1000 * x[1:]])
    assert torch.equal(dynamic()(x)[0], dynamic()(louder)[0])


def test_error_is_at_most_half_a_step_of_the_row():
    x = torch.randn(64, 33) * torch.logspace(-3, 3, 64)[:, None]
    assert ((dynamic()(x) - x).abs() <= token_scale(x, 127) * 0.50001).all()


def test_gradient_is_one_everywhere():
    x = torch.randn(5, 9, requires_grad=True)
    weight = torch.randn(5, 9)
    (dynamic()(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_behind_a_relu_codes_are_unsigned():
    x = torch.tensor([[0.0, 1.0, 255.0]])
    assert torch.equal(dynamic(QuantSpec(8, signed=False)).codes(x), x)


def test_nothing_is_learned_and_calibration_changes_no_value():
    quant, x = calibrated_site(), 100 * torch.randn(4, 6)
    assert list(quant.parameters()) == []
    assert torch.equal(quant(x), dynamic()(x))
    before = quant.quantizer.scale.clone()
    quant.train()(x)
    assert torch.equal(quant.quantizer.scale, before)
    assert not quant.is_static


def test_half_precision_keeps_its_type():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert dynamic()(x).dtype is torch.bfloat16


def test_codec_computes_the_same_bits():
    x = torch.randn(4, 7, 6) * torch.logspace(-6, 3, 28).view(4, 7, 1)
    quant = calibrated_site()
    codec = make_codec(quant)
    assert isinstance(codec, DynamicCodec)
    assert torch.equal(codec(x), quant(x))


@pytest.mark.parametrize(
    ("spec", "has_batch"),
    [
        (QuantSpec(8, symmetric=False), True),
        (QuantSpec(8, power_of_two=True), True),
        (QuantSpec(8), False),
    ],
    ids=["affine", "power-of-two", "weight"],
)
def test_formats_that_make_no_sense(spec, has_batch):
    with pytest.raises(SpecError, match="quantizer Dynamic on activations that are symmetric"):
        QUANTIZERS["dynamic"](spec, (), has_batch=has_batch)
