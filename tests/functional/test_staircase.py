"""The soft staircase: the paper's formula, its corners, its slope and both of its limits."""

import numpy as np
import pytest
import torch

from qat.functional.staircase import MIN_SOFTNESS, staircase


def formula(x, softness, delta, low):
    """The paper's phi and Q_S, in float64: cells of width delta from low, k from its alpha."""
    k = np.log(2 / softness - 1) / delta
    i = np.floor((x - low) / delta)
    middle = low + (i + 0.5) * delta
    phi = np.tanh(k * (x - middle)) / np.tanh(0.5 * k * delta)
    return low + delta * (i + (phi + 1) / 2)


@pytest.mark.parametrize("softness", [0.4, 0.2, 0.01])
def test_values_and_derivative_are_the_papers(softness):
    steps = (torch.rand(500) * 20 - 10).requires_grad_()
    result = staircase(steps, torch.tensor(softness))
    result.sum().backward()
    x = steps.detach().double().numpy()
    expected = formula(x * 0.3, softness, 0.3, -3.0) / 0.3
    np.testing.assert_allclose(result.detach().numpy(), expected, atol=2e-6)  # float32 of up to 10
    k, h = np.log(2 / softness - 1), x - np.floor(x) - 0.5
    slope = k * (1 - np.tanh(k * h) ** 2) / (2 * np.tanh(k / 2))
    assert steps.grad is not None
    np.testing.assert_allclose(steps.grad.numpy(), slope, rtol=1e-4)


def test_codes_and_middles_stay_where_they_are():
    points = torch.arange(-20, 21) / 2
    for softness in (0.9, 0.2, 0.001):
        # tanh(k / 2) / tanh(k / 2), whose two halves may be rounded apart
        torch.testing.assert_close(
            staircase(points, torch.tensor(softness)), points, rtol=0, atol=1e-6
        )


def test_softness_leads_from_the_identity_to_rounding():
    steps = torch.linspace(-4, 4, 1601)
    steps = steps[(steps - steps.floor() - 0.5).abs() > 0.1]
    errors = [
        ((staircase(steps, torch.tensor(s)) - steps.round()).abs().max().item())
        for s in (0.999, 0.5, 0.2, 0.01, 1e-4, 0.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(0.4, abs=0.01)
    assert errors[-1] < 0.06
    assert torch.isfinite(staircase(steps, torch.tensor(0.0))).all()
    assert torch.equal(
        staircase(steps, torch.tensor(0.0)), staircase(steps, torch.tensor(MIN_SOFTNESS))
    )
