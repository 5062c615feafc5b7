"""Binary and IR-Net: signs, scales, and gradients of the sign written out."""

import math

import pytest
import torch

from qat.errors import SpecError
from qat.quantizers import Binary, IRNet
from qat.spec import QuantSpec

KINDS = [Binary, IRNet]
SPECS = [QuantSpec(1), QuantSpec(1, axis=0, narrow=True)]


def weights():
    return torch.randn(3, 400) * torch.tensor([[0.1], [1.0], [7.0]]) + 0.05


def made(kind, spec, w):
    quantizer = kind(spec, spec.scale_shape(w.shape), has_batch=False)
    quantizer.follow(w)
    return quantizer


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_binary_weight_is_its_sign_times_the_mean_magnitude(spec):
    w = weights()
    quantizer = made(Binary, spec, w)
    mean = w.abs().mean(1, keepdim=True) if spec.axis == 0 else w.abs().mean()
    torch.testing.assert_close(quantizer.scale, mean)
    assert torch.equal(quantizer.codes(w), w.sign())
    assert torch.equal(quantizer(w), w.sign() * quantizer.scale)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_ir_net_weight_is_the_sign_around_the_mean_times_a_power_of_two(spec):
    w = weights()
    quantizer = made(IRNet, spec, w)
    centred = w - (w.mean(1, keepdim=True) if spec.axis == 0 else w.mean())
    size = centred.abs().mean(1, keepdim=True) if spec.axis == 0 else centred.abs().mean()
    assert torch.equal(quantizer.scale, torch.exp2(size.log2().round()))
    assert torch.equal(quantizer.codes(w), centred.sign())


@pytest.mark.parametrize("kind", KINDS)
def test_0_is_1_and_so_is_minus_0(kind):
    x = torch.tensor([-1e-30, -0.0, 0.0, 1e-30])
    for has_batch in (True, False):
        quantizer = kind(QuantSpec(1), (), has_batch=has_batch)
        assert torch.equal(quantizer.codes(x), torch.tensor([-1.0, 1, 1, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_unsigned_activation_is_parted_at_one_half(kind):
    quantizer = kind(QuantSpec(1, signed=False), (), has_batch=True)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(4.0))
    x = torch.tensor([-3.0, 0.0, 1.99, 2.0, 2.01, 9.0])
    assert torch.equal(quantizer(x), torch.tensor([0.0, 0, 0, 4, 4, 4]))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_have_a_format_that_holds_them(kind):
    assert kind.code_format(QuantSpec(1, axis=0)) == QuantSpec(2, axis=0, narrow=True)
    assert kind.code_format(QuantSpec(1, signed=False)) == QuantSpec(1, signed=False)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_of_a_binary_weight_is_1_up_to_the_scale(spec):
    w = weights().requires_grad_()
    quantizer = made(Binary, spec, w)
    quantizer(w).sum().backward()
    expected = (w.detach().abs() / quantizer.scale <= 1).float()
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(w.grad, expected)


def test_gradients_of_a_binary_activation():
    quantizer = Binary(QuantSpec(1), (), has_batch=True)
    quantizer.set_scale(torch.tensor(2.0))
    x = torch.tensor([-5.0, -2.0, -0.5, 1.0, 2.0, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1, 1, 1, 1, 0]))
    inside = (-1 + 1.0) + (-1 + 0.25) + (1 - 0.5) + (1 - 1.0)  # sign(v) - v, with v = x / scale
    assert quantizer.raw_scale.grad == inside - 1 + 1  # and the sign beyond


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_of_ir_net_is_the_error_decay_estimator(spec, progress):
    w = weights().requires_grad_()
    quantizer = made(IRNet, spec, w)
    quantizer.anneal(progress)
    quantizer(w).sum().backward()
    t = 10 ** (-1 + 2 * progress)
    axis = (1,) if spec.axis == 0 else (0, 1)
    d = w.detach().double()
    v = (d - d.mean(axis, keepdim=True)) / d.std(axis, correction=0, keepdim=True)
    slope = max(1 / t, 1) * t * (1 - torch.tanh(t * v) ** 2)
    scale = quantizer.scale.double() / d.std(axis, correction=0, keepdim=True)
    # float32 against float64; where tanh is close to 1 its square loses digits to the 1.
    assert w.grad is not None
    torch.testing.assert_close(w.grad.double(), slope * scale, rtol=1e-3, atol=1e-5)


def test_sharpness_goes_evenly_in_its_logarithm_and_is_saved():
    quantizer = IRNet(QuantSpec(1), (), has_batch=True)
    assert float(quantizer.sharpness) == pytest.approx(0.1)
    for progress, sharpness in ((0.0, 0.1), (0.25, 10**-0.5), (0.5, 1.0), (1.0, 10.0)):
        quantizer.anneal(progress)
        assert math.isclose(quantizer.sharpness, sharpness, rel_tol=1e-6)
    fresh = IRNet(QuantSpec(1), (), has_batch=True)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh.sharpness, quantizer.sharpness)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_gradients_of_an_ir_net_activation(signed):
    quantizer = IRNet(QuantSpec(1, signed=signed), (), has_batch=True)
    quantizer.set_scale(torch.tensor(2.0))
    quantizer.anneal(0.5)  # k = t = 1
    x = torch.tensor([-5.0, 0.5, 0.9, 1.0, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    v = x.detach() / 2 if signed else (x.detach() / 2 - 0.5) / 0.5
    torch.testing.assert_close(x.grad, 1 - torch.tanh(v) ** 2)
    codes = torch.tensor([-1.0, 1, 1, 1, 1] if signed else [0.0, 0, 0, 1, 1])
    assert quantizer.raw_scale.grad == codes.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spec", "has_batch"),
    [(QuantSpec(2), True), (QuantSpec(1, signed=False), False), (QuantSpec(1, symmetric=False), 1)],
)
def test_other_formats_are_refused(kind, spec, has_batch):
    with pytest.raises(SpecError, match="symmetric formats of 1 bit"):
        kind(spec, (), has_batch=bool(has_batch))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_scales_of_activations_learn(kind):
    weight, activation = (kind(QuantSpec(1), (), has_batch=b) for b in (False, True))
    assert not weight.learns
    assert not list(weight.parameters())
    assert activation.learns
    assert [name for name, _ in activation.named_parameters()] == ["raw_scale"]
    activation.set_range(torch.tensor(-3.0), torch.tensor(2.0))
    activation.follow(torch.randn(50))
    assert activation.scale == 3
    weight.set_range(torch.tensor(-3.0), torch.tensor(2.0))
    assert weight.scale == 1
