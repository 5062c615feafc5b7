"""Estimators: the formulas of their papers, element by element."""

import pickle

import numpy as np
import pytest
import torch

from qat.functional.estimators import dsq, ewgs
from qat.functional.fake_quantize import fake_quantize
from qat.functional.staircase import staircase
from qat.spec import QuantSpec


@pytest.mark.parametrize("spec", [QuantSpec(2, signed=False), QuantSpec(4), QuantSpec(4, axis=0)])
def test_ewgs_is_the_formula_in_each_region(spec):
    """Values normalised to 0..1 as the paper has them; outside the grid no gradient at all."""
    scale = torch.tensor(0.25) if spec.axis is None else torch.tensor([[0.25], [0.5], [2.0]])
    steps = torch.arange(8 * (spec.qmin - 2), 8 * (spec.qmax + 2) + 1) / 8
    x = (steps.expand(3, -1) * scale).requires_grad_()
    upstream = torch.randint(-2, 3, x.shape).float()
    width, delta = spec.qmax - spec.qmin, 0.5
    zero = torch.zeros_like(scale)
    fake_quantize(x, scale, zero, spec, estimate=ewgs(delta, width)).backward(upstream)
    assert x.grad is not None
    v, g = steps.numpy().astype(np.float64), upstream.numpy().astype(np.float64)
    normal, code = (v - spec.qmin) / width, (np.rint(v) - spec.qmin) / width
    inside = (normal >= 0) & (normal <= 1)
    expected = inside * g * (1 + delta * np.sign(g) * (normal - code))
    # The paper's numbers are no dyadic ones: a few roundings of float32.
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-6)
    assert (x.grad != upstream * torch.tensor(inside)).any()


def test_delta_0_is_straight_through():
    grad, above = torch.randn(100), torch.rand(100) - 0.5
    assert torch.equal(ewgs(0.0, 3)(grad, above), grad)


def test_estimators_can_be_pickled():
    grad, above = torch.randn(100), torch.rand(100) - 0.5
    estimate = ewgs(0.1, 3)
    assert torch.equal(pickle.loads(pickle.dumps(estimate))(grad, above), estimate(grad, above))


@pytest.mark.parametrize("softness", [0.4, 0.2, 0.01])
def test_dsq_is_the_slope_of_the_staircase(softness):
    spec, one = QuantSpec(4), torch.tensor(1.0)
    x = (torch.arange(-100, 101) / 11).requires_grad_()
    upstream = torch.randn(201)
    fake_quantize(x, one, one * 0, spec, estimate=dsq(softness)).backward(upstream)
    steps = x.detach().clone().requires_grad_()
    staircase(steps, torch.tensor(softness)).sum().backward()
    inside = (steps >= -8) & (steps <= 7)
    assert x.grad is not None
    assert steps.grad is not None
    torch.testing.assert_close(x.grad, upstream * steps.grad * inside, rtol=1e-4, atol=1e-6)
