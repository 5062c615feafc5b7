"""Straight-through functions: the forward value is exact, the gradient is the one promised."""

import math
from fractions import Fraction

import pytest
import torch

from qat.functional.ste import clamp_min_ste, power_of_two, replace_value, round_ste


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replace_value_is_exact_and_sends_the_gradient_on(dtype):
    value = (torch.randn(1000) * 1e3).requires_grad_()
    surrogate = torch.randn(1000).to(dtype).requires_grad_()
    result = replace_value(value, surrogate)
    assert torch.equal(result, value)
    upstream = torch.randint(-9, 9, (1000,)).float()
    result.backward(upstream)
    assert value.grad is None
    assert surrogate.grad is not None
    assert surrogate.grad.dtype is dtype
    assert torch.equal(surrogate.grad.float(), upstream)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (round_ste, [-2.0, -2.0, -0.0, 0.0, 2.0, 2.0, 3.0]),
        (lambda x: clamp_min_ste(x, 0.25), [0.25, 0.25, 0.25, 0.5, 1.5, 2.5, 2.75]),
    ],
    ids=["round", "clamp"],
)
def test_value_changes_and_gradient_does_not(function, expected):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.75], requires_grad=True)
    result = function(x)
    upstream = torch.arange(1.0, 8.0)
    result.backward(upstream)
    assert torch.equal(result, torch.tensor(expected))
    assert torch.equal(x.grad, upstream)


def test_power_of_two_is_exact_for_every_exponent():
    """From the smallest denormal on: at, and one float beside, each power and each middle."""
    powers = torch.tensor([2.0**e for e in range(-149, 128)])
    middles = torch.tensor([2.0 ** (e + 0.5) for e in range(-149, 127)])
    infinity = torch.tensor(math.inf)
    x = torch.cat([powers, middles])
    x = torch.cat([x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)])
    x = x[(x > 0) & (x <= 2.0**127)].unique()
    nearest, above = [], []
    for value in map(Fraction, x.tolist()):
        _, exponent = math.frexp(value)  # value in [2**(exponent - 1), 2**exponent)
        below, twice = Fraction(2) ** (exponent - 1), Fraction(2) ** exponent
        above.append(float(below if value == below else twice))
        nearest.append(float(twice if value**2 > below * twice else below))
    assert torch.equal(power_of_two(x, up=True), torch.tensor(above))
    assert torch.equal(power_of_two(x), torch.tensor(nearest))


def test_power_of_two_has_gradient_one():
    x = torch.tensor([0.3, 1.0, 1.7], requires_grad=True)
    power_of_two(x).backward(torch.tensor([1.0, -2.0, 3.0]))
    assert torch.equal(x.grad, torch.tensor([1.0, -2.0, 3.0]))
