"""What holds for every quantizer that has one uniform grid for all tensors."""

from typing import Any

import pytest
import torch

from qat.functional.affine import dequantize, scale_from_range
from qat.functional.fake_quantize import fake_quantize
from qat.quantizers import QUANTIZERS, Deployable
from qat.spec import QuantSpec

SPECS = [
    QuantSpec(4),
    QuantSpec(8, axis=0, narrow=True),
    QuantSpec(4, axis=0, group_size=2),
    QuantSpec(4, signed=False, symmetric=False),
    QuantSpec(4, axis=0, power_of_two=True),
]
UNSIGNED = [QuantSpec(2, signed=False), QuantSpec(8, signed=False), QuantSpec(4, axis=1)]
SIGNED = [s for s in SPECS if s.signed]
SYMMETRIC = [s for s in SPECS if s.symmetric]
FORMATS = {"dorefa": SIGNED, "learned_bits": SYMMETRIC, "pact": UNSIGNED, "tqt": SIGNED}
"""Of quantizers that do not have all of those."""
ACTIVATIONS = ("pact",)
OWN_SCALE = ("pact", "tqt")
"""Their scale for a range is not that of ``scale_from_range``; tested with each."""
SHAPE = (3, 4, 5)
STATIC = [
    name
    for name, kind in QUANTIZERS.items()
    if not kind.is_dynamic and (kind.deployable is Deployable.INTEGERS or name in FORMATS)
]
EACH: list[Any] = [
    pytest.param(name, spec, id=f"{name}-{spec}")
    for name in STATIC
    for spec in FORMATS.get(name, SPECS)
]
KEYS = {
    "dsq": ["learned_scale", "softness", "zero_point"],
    "tqt": ["log2_threshold", "zero_point"],
    "dorefa": ["observed_scale", "zero_point"],
    "ewgs": ["learned_scale", "zero_point"],
    "learned_bits": ["learned_limit", "learned_scale", "zero_point"],
    "pact": ["learned_clip", "zero_point"],
    "lsq": ["learned_scale", "zero_point"],
    "uniform": ["observed_scale", "zero_point"],
}


def keys(name, spec):
    """What a quantizer saves."""
    if name == "lsq_plus":
        return ["learned_scale"] if spec.symmetric else ["learned_offset", "learned_scale"]
    return KEYS[name]


def make(name, spec):
    shape = spec.scale_shape(SHAPE)
    return QUANTIZERS[name](spec, shape, has_batch=name in ACTIVATIONS).eval()


@pytest.mark.parametrize(("name", "spec"), EACH)
def test_range_codes_and_forward_agree(name, spec):
    quantizer, x = make(name, spec), torch.randn(SHAPE)
    low, high = torch.full(spec.scale_shape(SHAPE), -0.7), torch.full(spec.scale_shape(SHAPE), 1.1)
    quantizer.set_range(low, high)
    scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
    if name not in OWN_SCALE:
        expected = scale_from_range(low, high, quantizer.code_spec)
        assert torch.equal(scale, expected[0])
        assert torch.equal(zero_point, expected[1])
    codes = quantizer.codes(x)
    assert torch.equal(dequantize(codes, scale, zero_point), quantizer(x))
    assert torch.equal(codes, codes.round())
    assert codes.min() >= quantizer.code_spec.qmin
    assert codes.max() <= quantizer.code_spec.qmax
    if quantizer.deployable is Deployable.INTEGERS:
        expected = fake_quantize(x, scale, zero_point, quantizer.code_spec)
        assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize(("name", "spec"), EACH)
def test_state_is_complete_and_shaped_at_birth(name, spec):
    quantizer, shape = make(name, spec), spec.scale_shape(SHAPE)
    born = {key: value.shape for key, value in quantizer.state_dict().items()}
    assert sorted(born) == keys(name, spec)
    assert {size for key, size in born.items() if key != "softness"} == {shape}
    parameters = list(quantizer.parameters())
    quantizer.set_range(-torch.rand(shape), torch.rand(shape))
    assert {key: value.shape for key, value in quantizer.state_dict().items()} == born
    assert all(a is b for a, b in zip(quantizer.parameters(), parameters, strict=True))
    fresh, x = make(name, spec), torch.randn(SHAPE)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(x), quantizer(x))


@pytest.mark.parametrize("name", ["dsq", "ewgs", "lsq", "lsq_plus", "tqt", "uniform"])
def test_power_of_two_format_uses_powers_of_two_whatever_is_stored(name):
    spec = QuantSpec(8, power_of_two=True)
    quantizer = QUANTIZERS[name](spec, (), has_batch=True).eval()
    quantizer.set_range(torch.tensor(-3.0), torch.tensor(5.0))
    x = torch.randn(100)
    assert float(quantizer.scale.detach()) == 2.0**-4  # 5 / 127 lies between 2**-5 and 2**-4
    steps = quantizer(x) * 16
    assert torch.equal(steps, (x * 16).round())
