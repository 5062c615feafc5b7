"""What holds for every quantizer that has one uniform grid for all tensors."""

import pytest
import torch

from qat.functional.affine import dequantize, fake_quantize, scale_from_range
from qat.quantizers import QUANTIZERS, Deployable
from qat.spec import QuantSpec

SPECS = [
    QuantSpec(4),
    QuantSpec(8, axis=0, narrow=True),
    QuantSpec(4, axis=0, group_size=2),
    QuantSpec(4, signed=False, symmetric=False),
    QuantSpec(4, axis=0, power_of_two=True),
]
SHAPE = (3, 4, 5)
STATIC = [
    name
    for name, kind in QUANTIZERS.items()
    if not kind.is_dynamic and kind.deployable is not Deployable.TABLE
]
KEYS = {
    "lsq": ["learned_scale", "zero_point"],
    "uniform": ["observed_scale", "zero_point"],
}


def keys(name, spec):
    """What a quantizer saves."""
    if name == "lsq_plus":
        return ["learned_scale"] if spec.symmetric else ["learned_offset", "learned_scale"]
    return KEYS[name]


def make(name, spec, *, has_batch=False):
    return QUANTIZERS[name](spec, spec.scale_shape(SHAPE), has_batch=has_batch)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", STATIC)
def test_range_codes_and_forward_agree(name, spec):
    quantizer, x = make(name, spec), torch.randn(SHAPE)
    low, high = torch.full(spec.scale_shape(SHAPE), -0.7), torch.full(spec.scale_shape(SHAPE), 1.1)
    quantizer.set_range(low, high)
    scale, zero_point = scale_from_range(low, high, spec)
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.zero_point, zero_point)
    assert torch.equal(quantizer(x), fake_quantize(x, scale, zero_point, spec))
    assert torch.equal(dequantize(quantizer.codes(x), scale, zero_point), quantizer(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", STATIC)
def test_state_is_complete_and_shaped_at_birth(name, spec):
    quantizer, shape = make(name, spec), spec.scale_shape(SHAPE)
    born = {key: value.shape for key, value in quantizer.state_dict().items()}
    assert sorted(born) == keys(name, spec)
    assert set(born.values()) == {shape}
    parameters = list(quantizer.parameters())
    quantizer.set_range(-torch.rand(shape), torch.rand(shape))
    assert {key: value.shape for key, value in quantizer.state_dict().items()} == born
    assert all(a is b for a, b in zip(quantizer.parameters(), parameters, strict=True))
    fresh, x = make(name, spec), torch.randn(SHAPE)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(x), quantizer(x))


@pytest.mark.parametrize("name", STATIC)
def test_power_of_two_format_uses_powers_of_two_whatever_is_stored(name):
    spec = QuantSpec(8, power_of_two=True)
    quantizer = QUANTIZERS[name](spec, (), has_batch=True)
    quantizer.set_range(torch.tensor(-3.0), torch.tensor(5.0))
    x = torch.randn(100)
    assert float(quantizer.scale.detach()) == 2.0**-4  # 5 / 127 lies between 2**-5 and 2**-4
    steps = quantizer(x) * 16
    assert torch.equal(steps, (x * 16).round())
