"""TQT: powers of two from thresholds on a log axis, and the gradients of both."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from qat.errors import SpecError
from qat.functional.affine import MIN_SCALE
from qat.quantizers import TQT
from qat.spec import QuantSpec

FORMS = {"signed": {}, "narrow": {"narrow": True}, "unsigned": {"signed": False}}
SPECS = [QuantSpec(bits, **form) for bits in (2, 4, 8) for form in FORMS.values()]


def formula(steps, spec):
    """Return the slope of the scale and whether a value is inside, one at a time."""
    slope, inside = np.zeros(len(steps)), np.zeros(len(steps))
    for i, v in enumerate(steps):
        nearest = np.rint(v)
        if nearest < spec.qmin:
            slope[i] = spec.qmin
        elif nearest > spec.qmax:
            slope[i] = spec.qmax
        else:
            slope[i], inside[i] = nearest - v, 1
    return slope, inside


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_the_papers_exactly(spec, axis):
    """Eighths of a step; sums of dyadic numbers are exact, and ln(2) is multiplied at the end."""
    form = QuantSpec(spec.bits, spec.signed, axis=axis, narrow=spec.narrow)
    quantizer: Any = TQT(form, form.scale_shape((3, 1)), has_batch=False)
    log2 = torch.tensor([[-2.5], [0.25], [3.0]]) if axis == 0 else torch.tensor(0.25)
    with torch.no_grad():
        quantizer.log2_threshold.copy_(log2)
    scale = 2.0 ** (log2.ceil() - (spec.bits - spec.signed))
    assert torch.equal(quantizer.scale, scale)
    steps = torch.arange(8 * (spec.qmin - 3), 8 * (spec.qmax + 3) + 1) / 8
    x = (steps.expand(3, -1) * scale).requires_grad_()
    upstream = torch.randint(-1, 2, x.shape).float()
    result = quantizer(x)
    result.backward(upstream)
    slope, inside = (torch.tensor(part).float() for part in formula(steps.numpy(), spec))
    total = (upstream * slope).sum(1, keepdim=True) if axis == 0 else (upstream * slope).sum()
    assert torch.equal(quantizer.log2_threshold.grad, total * scale * math.log(2))
    assert torch.equal(x.grad, upstream * inside)
    assert torch.equal(result, (steps.round().clamp(spec.qmin, spec.qmax)).expand(3, -1) * scale)


def test_values_that_round_to_the_last_code_are_inside():
    """Unlike LSQ, whose grid ends at the code itself."""
    quantizer = TQT(QuantSpec(3), (), has_batch=True)  # threshold 1, scale 1/4, codes to 3
    x = torch.tensor([0.75, 0.85, 0.9], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_range_sets_the_paper_s_scale(bits, signed):
    """2 ** ceil(log2 t), whole also where t is a power of two already."""
    quantizer = TQT(QuantSpec(bits, signed), (), has_batch=True)
    for exponent in range(-12, 13):
        for factor in (1.0, 1.01, 1.5, 1.99):
            top = torch.tensor(factor * 2.0**exponent)
            quantizer.set_range(-top, top / 2) if signed else quantizer.set_range(top * 0, top)
            power = exponent + (factor > 1)
            assert quantizer.scale == 2.0 ** (power - bits + signed)


def test_dead_and_runaway_thresholds_leave_a_positive_scale():
    quantizer = TQT(QuantSpec(8), (), has_batch=True)
    quantizer.set_range(torch.zeros(()), torch.zeros(()))
    assert quantizer.scale == MIN_SCALE
    with torch.no_grad():
        quantizer.log2_threshold.fill_(-1000.0)
    assert quantizer.scale == MIN_SCALE
    assert quantizer(torch.randn(10)).isfinite().all()


@pytest.mark.parametrize("start", [-3.0, 5.0])
def test_threshold_finds_the_data(start):
    """Clipping errors outweigh rounding errors from below, and the other way round from above."""
    quantizer, x = TQT(QuantSpec(4), (), has_batch=False), torch.randn(2000)
    with torch.no_grad():
        quantizer.log2_threshold.fill_(start)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert quantizer.scale in (0.25, 0.5)  # of the powers of two, these have the least error
    assert (quantizer(x) - x).square().mean() < 0.03


def test_affine_formats_are_refused():
    with pytest.raises(SpecError, match="TQT on symmetric formats"):
        TQT(QuantSpec(4, symmetric=False), (), has_batch=True)
