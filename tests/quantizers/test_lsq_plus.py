"""LSQ+: the offset's and the scale's gradients, and a zero point that stays a code."""

from typing import Any

import numpy as np
import pytest
import torch

from qat.functional.affine import dequantize
from qat.quantizers import LSQ, LSQPlus
from qat.spec import QuantSpec

AFFINE = [
    QuantSpec(2, signed=False, symmetric=False),
    QuantSpec(4, symmetric=False),
    QuantSpec(8, signed=False, symmetric=False),
]


def on_grid(spec, scale, zero_point, *, has_batch=False) -> Any:
    """A quantizer with exactly this grid; scales are powers of two."""
    quantizer: Any = LSQPlus(spec, tuple(scale.shape), has_batch=has_batch)
    quantizer.set_scale(scale)
    with torch.no_grad():
        quantizer.learned_offset.copy_(-zero_point * scale)
    return quantizer


def formula(steps, zero_point, spec):
    """Return the slopes of scale and offset, and whether a value is inside, one at a time."""
    scale, offset, inside = (np.zeros(len(steps)) for _ in range(3))
    for i, v in enumerate(steps):
        if v + zero_point < spec.qmin:
            scale[i], offset[i] = spec.qmin, 1
        elif v + zero_point > spec.qmax:
            scale[i], offset[i] = spec.qmax, 1
        else:
            scale[i], inside[i] = np.rint(v) - v, 1
    return scale, offset, inside


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("spec", AFFINE, ids=str)
def test_gradients_are_the_papers_exactly(spec, axis):
    """Eighths of a step; all numbers are small dyadic fractions, so sums are exact."""
    shape = () if axis is None else (3, 1)
    scale = torch.tensor(0.25) if axis is None else torch.tensor([[0.5], [0.25], [2.0]])
    middle = (spec.qmin + spec.qmax) // 2
    zero = torch.tensor(float(middle))
    if axis == 0:
        zero = torch.tensor([[spec.qmin], [middle], [spec.qmax]]).float()
    quantizer = on_grid(QuantSpec(spec.bits, spec.signed, False, axis), scale, zero)
    width = spec.qmax - spec.qmin
    steps = torch.arange(-8 * (width + 2), 8 * (width + 2) + 1) / 8
    x = (steps.expand(3, -1) * scale).requires_grad_()
    upstream = torch.randint(-1, 2, x.shape).float()
    quantizer.gradient_factor = lambda x: 0.25  # the real one is not dyadic
    quantizer(x).backward(upstream)
    rows = [formula(steps.numpy(), float(z), spec) for z in zero.expand(3, 1).flatten()]
    slopes = [torch.tensor(np.stack(part)).float() for part in zip(*rows, strict=True)]
    expected = [
        0.25 * (s * upstream).sum(None if axis is None else 1).view(shape) for s in slopes[:2]
    ]
    assert torch.equal(quantizer.learned_scale.grad, expected[0])
    assert torch.equal(quantizer.learned_offset.grad, expected[1])
    assert torch.equal(x.grad, slopes[2] * upstream)


def test_gradients_have_the_factor_of_lsq():
    spec, x = AFFINE[1], torch.randn(5, 6, 3)
    found = []
    for plain in (False, True):
        quantizer = on_grid(spec, torch.tensor(0.125), torch.tensor(2.0), has_batch=True)
        if plain:
            quantizer.gradient_factor = lambda x: 1.0
        quantizer(x).sum().backward()
        found.append([p.grad.clone() for p in (quantizer.learned_scale, quantizer.learned_offset)])
    for small, plain in zip(*found, strict=True):
        assert plain != 0
        torch.testing.assert_close(small, plain / (6 * 3 * 7) ** 0.5)  # one rounding of the factor


@pytest.mark.parametrize("spec", AFFINE, ids=str)
def test_every_zero_point_comes_back_and_0_stays_exact(spec):
    for code in range(spec.qmin, spec.qmax + 1):
        quantizer = on_grid(spec, torch.tensor(0.0371), torch.tensor(float(code)))
        assert quantizer.zero_point == code
        assert quantizer(torch.zeros(1)) == 0
        codes = torch.arange(spec.qmin, spec.qmax + 1).float()
        x = dequantize(codes, quantizer.scale.detach(), quantizer.zero_point)
        assert torch.equal(quantizer.codes(x), codes)
        assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize(("offset", "code"), [(1e9, 0), (3.0, 0), (-1e9, 15), (-7.3, 15)])
def test_offset_driven_away_leaves_the_zero_point_on_the_grid(offset, code):
    quantizer = on_grid(QuantSpec(4, signed=False, symmetric=False), torch.tensor(0.1), 0)
    with torch.no_grad():
        quantizer.learned_offset.fill_(offset)
    assert quantizer.zero_point == code
    x = torch.randn(1000, requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.learned_offset.grad != 0  # so it can come back


def test_offset_is_learned_towards_the_lowest_value():
    """SiLU has its minimum of -0.278 beside a long tail; a grid that starts at 0 misses it."""
    quantizer = on_grid(QuantSpec(4, signed=False, symmetric=False), torch.tensor(0.3), 0)
    x = torch.nn.functional.silu(torch.linspace(-5, 4, 2000))
    before = (quantizer(x) - x).square().mean()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert quantizer.zero_point == 1
    assert (quantizer(x) - x).square().mean() < before / 2


def test_symmetric_formats_are_lsq():
    spec, x = QuantSpec(4, axis=0), torch.randn(3, 50)
    results = []
    for kind in (LSQ, LSQPlus):
        quantizer: Any = kind(spec, (3, 1), has_batch=False)
        quantizer.set_range(torch.full((3, 1), -1.0), torch.full((3, 1), 0.7))
        quantizer(x).square().sum().backward()
        assert len(list(quantizer.parameters())) == 1
        results.append((quantizer(x), quantizer.learned_scale.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_half_floats_are_quantized_in_float32():
    quantizer = on_grid(AFFINE[2], torch.tensor(0.0371), torch.tensor(100.0))
    x = torch.linspace(-6, 6, 4001).bfloat16().requires_grad_()
    result = quantizer(x)
    result.sum().backward()
    assert x.grad is not None
    assert result.dtype is x.grad.dtype is torch.bfloat16
    assert torch.equal(result, quantizer(x.detach().float()).bfloat16())
