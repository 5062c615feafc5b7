"""Ternary weights: cutoff and scale are the papers', per tensor and per channel."""

import pytest
import torch

from qat.errors import SpecError
from qat.fake_quant import Phase, make_fake_quant
from qat.quantizers import Ternary, TernaryLearned
from qat.spec import QuantSpec

KINDS = [Ternary, TernaryLearned]
SPECS = [QuantSpec(2), QuantSpec(2, axis=0, narrow=True)]


def rows(x, spec):
    return x if spec.axis == 0 else x.reshape(1, -1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cutoff_scale_and_codes_are_those_of_the_paper(kind, spec):
    quantizer = kind(spec, spec.scale_shape((4, 300)), has_batch=False)
    w = torch.randn(4, 300) * torch.tensor([[0.1], [0.2], [0.3], [5.0]])
    quantizer.follow(w)
    quantizer.set_range(torch.tensor(-9.0), torch.tensor(9.0))
    codes = rows(quantizer.codes(w), spec)
    for row, scale, found in zip(rows(w, spec), quantizer.scale.flatten(), codes, strict=True):
        size = 0.7 * row.abs().mean() if kind is Ternary else 0.05 * row.abs().max()
        above = row.abs() > size
        assert torch.equal(found, torch.where(above, row.sign(), 0.0))
        # The same mean, summed in another order.
        torch.testing.assert_close(scale, row[above].abs().mean(), rtol=1e-5, atol=0)
    assert torch.equal(quantizer(w), quantizer.codes(w) * quantizer.scale)


def test_a_weight_on_the_cutoff_is_0():
    quantizer = Ternary(QuantSpec(2), (), has_batch=False)
    quantizer.cutoff.fill_(0.5)
    up = torch.tensor(0.5).nextafter(torch.tensor(1.0))
    w = torch.stack([-up, torch.tensor(-0.5), torch.tensor(0.0), torch.tensor(0.5), up])
    assert torch.equal(quantizer.codes(w), torch.tensor([-1.0, 0, 0, 0, 1]))


def test_scale_of_ternary_is_the_best_for_its_codes():
    quantizer, w = Ternary(QuantSpec(2), (), has_batch=False), torch.randn(2000)
    quantizer.follow(w)

    def error(factor):
        return (w - quantizer.codes(w) * quantizer.scale * factor).square().sum()

    assert error(1.0) < min(error(0.99), error(1.01))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_0_leave_a_positive_scale(kind):
    quantizer = kind(QuantSpec(2, axis=0), (2, 1), has_batch=False)
    w = torch.stack([torch.zeros(5), torch.ones(5)])
    quantizer.follow(w)
    quantizer.set_range(torch.zeros(2, 1), torch.zeros(2, 1))
    assert (quantizer.scale > 0).all()
    assert torch.equal(quantizer(w)[0], torch.zeros(5))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_gradient_1(kind):
    quantizer = kind(QuantSpec(2), (), has_batch=False)
    w = torch.linspace(-3, 3, 50, requires_grad=True)
    quantizer.follow(w)
    quantizer(w).sum().backward()
    assert torch.equal(w.grad, torch.ones(50))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_learned_scale_sums_the_gradients_of_the_weights_that_have_it(spec):
    quantizer = TernaryLearned(spec, spec.scale_shape((4, 50)), has_batch=False)
    w, weights = torch.randn(4, 50), torch.randint(-4, 5, (4, 50)).float()
    quantizer.follow(w)
    (quantizer(w) * weights).sum().backward()
    cutoff = 0.05 * rows(w, spec).abs().amax(1, keepdim=True)
    positive, negative = rows(w, spec) > cutoff, rows(w, spec) < -cutoff
    g = rows(weights, spec)
    expected = (g * positive).sum(1) - (g * negative).sum(1)
    assert quantizer.learned_scale.grad is not None
    assert torch.equal(quantizer.learned_scale.grad.flatten(), expected)  # whole numbers


def test_following_moves_a_cutoff_but_no_learned_scale():
    quantizer = TernaryLearned(QuantSpec(2), (), has_batch=False)
    quantizer.set_scale(torch.tensor(0.3))
    quantizer.follow(torch.randn(100))
    cutoff = quantizer.cutoff.clone()
    quantizer.follow(torch.randn(100) * 9)
    assert quantizer.cutoff > cutoff
    assert float(quantizer.scale.detach()) == pytest.approx(0.3)


def test_a_weight_used_twice_in_one_step_has_its_gradient():
    fake_quant = make_fake_quant(
        "weight", QuantSpec(2), (4, 9), quantizer="ternary", observer="min_max", has_batch=False
    )
    w = torch.randn(4, 9, requires_grad=True)
    fake_quant.set_phase(Phase.OBSERVE)
    fake_quant(w)
    fake_quant.finish_calibration()
    fake_quant.set_phase(Phase.QUANTIZE)
    (fake_quant(w) + 2 * fake_quant(w)).sum().backward()
    assert torch.equal(w.grad, torch.full((4, 9), 3.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spec", "has_batch"),
    [(QuantSpec(3), False), (QuantSpec(2, signed=False), False), (QuantSpec(2), True)],
)
def test_other_formats_and_activations_are_refused(kind, spec, has_batch):
    with pytest.raises(SpecError, match="weights with bits: 2"):
        kind(spec, (), has_batch=has_batch)
