from itertools import pairwise
from typing import Any

import pytest
import torch

from qat.functional.rounding import (
    annealed_beta,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
)


def test_rectified_sigmoid_and_its_gradient_are_equation_23():
    v = torch.linspace(-4, 4, 81).requires_grad_()
    rectified_sigmoid(v).sum().backward()
    sigmoid = 1 / (1 + (-v.detach()).exp())
    stretched = 1.2 * sigmoid - 0.1
    torch.testing.assert_close(rectified_sigmoid(v.detach()), stretched.clamp(0, 1))
    inside = (stretched > 0) & (stretched < 1)
    torch.testing.assert_close(v.grad, inside * 1.2 * sigmoid * (1 - sigmoid))
    assert inside.sum() == 47  # |v| < log(11) = 2.4


def test_the_inverse_brings_every_share_back():
    h = torch.linspace(0, 1, 101)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)


@pytest.mark.parametrize("beta", [2.0, 7.0, 20.0])
def test_penalty_and_its_gradient_are_equation_24(beta):
    h = torch.linspace(0, 1, 11).requires_grad_()
    penalty = rounding_penalty(h, beta)
    penalty.backward()
    far = 2 * h.detach() - 1
    torch.testing.assert_close(penalty, (1 - far.abs() ** beta).sum())
    torch.testing.assert_close(h.grad, -2 * beta * far.sign() * far.abs() ** (beta - 1))
    assert rounding_penalty(torch.tensor([0.0, 1.0, 1.0]), beta) == 0


def test_beta_falls_behind_the_warm_up():
    betas: list[Any] = [annealed_beta(i / 10, 0.2, 20.0, 2.0) for i in range(11)]
    assert betas[:3] == [None, None, 20.0]
    assert betas[6] == pytest.approx(11.0)  # half way
    assert betas[10] == pytest.approx(2.0)
    assert all(a > b for a, b in pairwise(betas[2:]))
