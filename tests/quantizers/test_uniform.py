"""Uniform: no gradient moves its scale, and x gets the clipped straight-through one."""

import torch

from qat.fake_quant import Phase, make_fake_quant
from qat.quantizers import Uniform
from qat.spec import QuantSpec


def test_gradient_passes_where_nothing_was_clipped():
    quantizer = Uniform(QuantSpec(4, axis=0), (2, 1), has_batch=False)
    quantizer.set_range(torch.tensor([[-8.0], [-4.0]]), torch.tensor([[7.0], [3.5]]))
    x = torch.tensor([[-8.5, -8.0, 0.3, 7.0, 7.5], [-4.25, -4.0, 0.3, 3.5, 3.75]])
    x.requires_grad_()
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 1, 1, 1, 0]] * 2))
    assert not list(quantizer.parameters())


def test_largest_weight_of_every_channel_is_inside_its_grid():
    """A scale rounded down would clip it by an ulp and take its gradient away."""
    quantizer = Uniform(QuantSpec(8, axis=0, narrow=True), (1000, 1), has_batch=False)
    x = torch.randn(1000, 20, requires_grad=True)
    quantizer.set_range(x.detach().amin(1, keepdim=True), x.detach().amax(1, keepdim=True))
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_site_that_follows_two_tensors_of_one_step_has_a_gradient():
    fake_quant = make_fake_quant(
        "concat", QuantSpec(8), (4,), quantizer="uniform", observer="min_max", has_batch=True
    )
    fake_quant.set_phase(Phase.OBSERVE)
    fake_quant(torch.ones(4))
    fake_quant.finish_calibration()
    fake_quant.set_phase(Phase.QUANTIZE)
    a, b = torch.randn(4, requires_grad=True), (10 * torch.randn(4)).requires_grad_()
    (fake_quant(a).sum() + fake_quant(b).sum()).backward()  # the second range is wider
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, torch.ones(4))
    assert torch.equal(b.grad, torch.ones(4))
