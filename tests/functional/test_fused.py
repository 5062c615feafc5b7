"""Fused kernels: the same values and gradients as the readable arithmetic, bit for bit."""

import logging

import pytest
import torch

from qat.functional import fused, inductor
from qat.functional.fake_quantize import fake_quantize
from qat.functional.fused import fused_kernels
from qat.functional.kernels import compiles, make_kernels
from qat.functional.layout import find_rows
from qat.spec import QuantSpec

SPECS = [
    QuantSpec(8, signed=False),
    QuantSpec(4),
    QuantSpec(2, narrow=True),
    QuantSpec(3, signed=False, symmetric=False),
    QuantSpec(16),
]
LAYOUTS = {
    "tensor": ((64, 16, 5, 7), ()),
    "row": ((32 * 1024,), ()),
    "axis 0": ((64, 16, 5, 7), (64, 1, 1, 1)),
    "groups": ((64, 512), (64, 8)),
    "groups of a convolution": ((32, 64, 3, 3), (32, 4, 1, 1)),
}


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)


def grid_of(spec, shape, *, dyadic=False):
    scale = torch.rand(shape) * 0.1 + 0.01
    if dyadic:  # all sums of products are exact, in any order
        scale = torch.full(shape, 0.25)
    middle = (spec.qmin + spec.qmax) // 2 if not spec.symmetric else 0
    return scale, torch.full(shape, float(middle))


def run(x, scale, zero_point, spec, upstream, *, compiled):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    if compiled:
        with fused_kernels():
            y = fake_quantize(x, scale, zero_point, spec, factor=0.5)
        assert "Fused" in str(y.grad_fn)
    else:
        y = fake_quantize(x, scale, zero_point, spec, factor=0.5)
    y.backward(upstream.to(y.dtype))  # outside: the backward knows by itself
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kernels_equal_the_readable_arithmetic(spec, layout):
    shape, scale_shape = LAYOUTS[layout]
    scale, zero_point = grid_of(spec, scale_shape)
    x = torch.randn(shape) * float(scale.mean()) * (spec.qmax - spec.qmin) / 2
    upstream = torch.randn(shape)
    ours = run(x, scale, zero_point, spec, upstream, compiled=True)
    theirs = run(x, scale, zero_point, spec, upstream, compiled=False)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-4 * spec.qmax)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_scales_are_equal_where_sums_are_exact(layout):
    """Ends of the grid, values beyond them, ties and codes, with whole numbers for gradients."""
    shape, scale_shape = LAYOUTS[layout]
    spec = QuantSpec(4)
    scale, zero_point = grid_of(spec, scale_shape, dyadic=True)
    x = torch.arange(torch.Size(shape).numel()).reshape(shape) % 97 / 16 - 3
    upstream = torch.randint(-3, 4, shape).float()
    ours = run(x, scale, zero_point, spec, upstream, compiled=True)
    theirs = run(x, scale, zero_point, spec, upstream, compiled=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [1023, 1026, 3 * 2**17, 5 * 2**16 + 2])
def test_sums_fall_into_rows_of_every_number(size):
    """None, two short ones, several long ones, and more than rows have room for."""
    spec = QuantSpec(4)
    scale, zero_point = grid_of(spec, (), dyadic=True)
    x = torch.arange(size) % 97 / 16 - 3
    upstream = torch.randint(-3, 4, (size,)).float()
    ours = run(x, scale, zero_point, spec, upstream, compiled=True)
    theirs = run(x, scale, zero_point, spec, upstream, compiled=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_is_no_number_stays_none_and_infinity_is_clamped():
    spec, (scale, zero_point) = QuantSpec(4), grid_of(QuantSpec(4), ())
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0]).repeat(11)
    for compiled in (True, False):
        y = run(x, scale, zero_point, spec, torch.ones(66), compiled=compiled)[0]
        assert y[0].isnan()
        assert torch.equal(y[1:6] / scale, torch.tensor([7.0, -8.0, 7.0, -8.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_floats_are_quantized_in_float32(dtype):
    spec, (scale, zero_point) = QuantSpec(8), grid_of(QuantSpec(8), ())
    x, upstream = torch.randn(64, 300).to(dtype), torch.randn(64, 300)
    ours = run(x, scale, zero_point, spec, upstream, compiled=True)
    theirs = run(x, scale, zero_point, spec, upstream, compiled=False)
    assert [value.dtype for value in ours if value is not None] == [dtype, dtype, torch.float32]
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_strides_stay_and_gradients_may_have_others():
    spec, (scale, zero_point) = QuantSpec(4), grid_of(QuantSpec(4), ())
    x = torch.randn(4, 16, 9, 9).to(memory_format=torch.channels_last)
    upstream = torch.randn(4, 16, 9, 9)
    ours = run(x, scale, zero_point, spec, upstream, compiled=True)
    theirs = run(x, scale, zero_point, spec, upstream, compiled=False)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("x", "scale_shape"),
    [
        (torch.zeros(8, 6)[:, :4], ()),  # holes
        (torch.zeros(8, 1).expand(8, 6), ()),  # elements that are one
        (torch.zeros(8, 6), (1, 6)),  # a scale's elements lie apart
        (torch.zeros(8, 6).t(), (6, 1)),
        (torch.zeros(4, 8, 3, 3).to(memory_format=torch.channels_last), (4, 2, 1, 1)),
    ],
)
def test_other_layouts_are_left_to_the_readable_arithmetic(x, scale_shape):
    assert find_rows(x, torch.Size(scale_shape)) is None


def test_nothing_is_kept_but_the_input():
    scale, zero_point = grid_of(QuantSpec(4), ())
    kept = []
    with (
        fused_kernels(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t),
    ):
        fake_quantize(torch.randn(1000, 40).requires_grad_(), scale, zero_point, QuantSpec(4))
    assert sorted(kept) == [1, 40_000]


def forget():
    compiles.cache_clear()
    make_kernels.cache_clear()


def test_without_a_compiler_it_runs_as_it_is_and_says_so_once(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler here\nand more")

    monkeypatch.setattr(inductor, "_compile", refuse)
    scale, zero_point = grid_of(QuantSpec(4), ())
    x = torch.randn(100, 10)
    forget()
    try:
        with fused_kernels(), caplog.at_level(logging.WARNING, "qat"):
            found = [fake_quantize(x, scale, zero_point, QuantSpec(4)) for _ in range(2)]
    finally:
        forget()
    assert torch.equal(found[0], fake_quantize(x, scale, zero_point, QuantSpec(4)))
    assert [r.message for r in caplog.records] == [
        "fake-quantization runs uncompiled and slower: no C++ compiler here"
    ]
