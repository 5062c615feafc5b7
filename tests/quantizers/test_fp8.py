"""FP8 and FP4: what range and scale make of the numbers of a format, and the gradient."""

import pytest
import torch

from qat.errors import SpecError
from qat.functional.float_formats import FLOAT_FORMATS, round_to_float
from qat.quantizers import FP4, FP8, QUANTIZERS
from qat.spec import QuantSpec

SHAPE = (4, 6, 3)
KINDS = [
    (FP8, 8, {"format": "e4m3"}, "e4m3"),
    (FP8, 8, {"format": "e5m2"}, "e5m2"),
    (FP4, 4, {}, "e2m1"),
]
LAYOUTS = [{}, {"axis": 0}, {"axis": 0, "group_size": 2}, {"signed": False}]
kinds = pytest.mark.parametrize(("kind", "bits", "options", "name"), KINDS)


def make(kind, spec, options, *, has_batch=False):
    return kind(spec, spec.scale_shape(SHAPE), has_batch=has_batch, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@kinds
def test_observed_range_maps_to_the_largest_number(kind, bits, options, name, layout):
    form, spec = FLOAT_FORMATS[name], QuantSpec(bits, **layout)
    quantizer = make(kind, spec, options)
    shape = spec.scale_shape(SHAPE)
    low, high = -torch.rand(shape) - 0.1, torch.rand(shape) + 0.1
    quantizer.set_range(low, high)
    assert torch.equal(quantizer.scale, torch.maximum(-low, high) / form.largest)
    x, scale = torch.randn(SHAPE), quantizer.scale
    for axis, blocks in enumerate(shape):
        scale = scale.repeat_interleave(SHAPE[axis] // blocks, dim=axis)
    assert torch.equal(quantizer(x), round_to_float(x / scale, form) * scale)
    assert not quantizer.zero_point.any()


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_with_scale_1_the_numbers_are_those_of_torch(format):
    quantizer = FP8(QuantSpec(8), (), has_batch=True, format=format)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[format]
    x = torch.randn(1000) * 30
    assert torch.equal(quantizer(x), x.to(dtype).float())


@kinds
def test_gradient_is_1_and_0_where_it_saturates(kind, bits, options, name):
    quantizer, top = make(kind, QuantSpec(bits), options), FLOAT_FORMATS[name].largest
    quantizer.set_scale(torch.tensor(0.5))
    ends = torch.tensor([-1.001, -1.0, -0.3, 0.0, 0.7, 1.0, 1.001, 9.0]) * top / 2
    x = ends.clone().requires_grad_()
    (quantizer(x) * torch.arange(1.0, 9.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_half_floats_come_back_as_they_are(kind, bits, options, name, dtype):
    quantizer = make(kind, QuantSpec(bits), options)
    quantizer.set_scale(torch.tensor(0.25))
    x = torch.randn(100, dtype=dtype, requires_grad=True)
    y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(
        y, (round_to_float(x.detach().float() * 4, FLOAT_FORMATS[name]) / 4).to(dtype)
    )
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("name", ["fp4", "fp8", "mx", "nvfp4"])
def test_there_are_no_codes(name):
    quantizer = QUANTIZERS[name](QuantSpec(8 if name == "fp8" else 4), (), has_batch=True)
    with pytest.raises(SpecError, match=r"expected a quantizer with integer codes, got .*lsq"):
        quantizer.codes(torch.randn(4))


@pytest.mark.parametrize("name", ["fp4", "fp8", "mx", "nvfp4"])
@pytest.mark.parametrize("axis", [None, 0])
def test_state_is_complete_and_shaped_at_birth(name, axis):
    spec = QuantSpec(8 if name == "fp8" else 4, axis=axis)
    quantizer, fresh = (make(QUANTIZERS[name], spec, {}) for _ in range(2))
    born = {key: value.shape for key, value in quantizer.state_dict().items()}
    shape = spec.scale_shape(SHAPE)
    assert born == {"zero_point": shape, "observed_scale": shape}
    assert not list(quantizer.parameters())
    quantizer.set_range(-torch.rand(shape), torch.rand(shape))
    assert {key: value.shape for key, value in quantizer.state_dict().items()} == born
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    x = torch.randn(SHAPE)
    assert torch.equal(fresh(x), quantizer(x))


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("fp8", QuantSpec(4), "FP8 on symmetric formats of 8 bits.* got a weight in i4"),
        ("fp4", QuantSpec(8), "FP4 on symmetric formats of 4 bits"),
        ("fp8", QuantSpec(8, symmetric=False), "FP8 on symmetric"),
        ("fp4", QuantSpec(4, power_of_two=True), "not power_of_two"),
        ("nvfp4", QuantSpec(8), "NVFP4 on symmetric formats of 4 bits"),
        ("mx", QuantSpec(5), "MX on symmetric formats.* 4, 6 or 8"),
        ("mx", QuantSpec(8), "expected bits=4, the width of the float format that MX is set to"),
    ],
)
def test_formats_that_are_none_are_refused(name, spec, message):
    with pytest.raises(SpecError, match=message):
        QUANTIZERS[name](spec, (), has_batch=False)


def test_unknown_float_format_is_refused():
    with pytest.raises(SpecError, match=r"among \['e4m3', 'e5m2'\], got 'e3m4'"):
        FP8(QuantSpec(8), (), has_batch=False, format="e3m4")
