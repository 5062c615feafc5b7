"""PACT: the clip's gradient, in every phase that quantizes, and a clip that stays positive."""

import numpy as np
import pytest
import torch

from qat.errors import SpecError
from qat.fake_quant import Phase, make_fake_quant
from qat.functional.affine import MIN_SCALE
from qat.quantizers import PACT
from qat.spec import QuantSpec


def test_gradients_are_those_of_the_clipping_exactly():
    """Eighths on both sides of 0 and of the clip, which itself belongs to the clip."""
    quantizer = PACT(QuantSpec(3, signed=False), (), has_batch=True)
    with torch.no_grad():
        quantizer.learned_clip.fill_(1.75)
    x = (torch.arange(-20, 21) / 8).requires_grad_()
    upstream = torch.randint(-3, 4, x.shape).float()
    result = quantizer(x)
    result.backward(upstream)
    v, g = x.detach().numpy(), upstream.numpy()
    expected = np.clip(np.rint(v / 0.25), 0, 7) * 0.25
    assert np.array_equal(result.detach().numpy(), expected)
    assert x.grad is not None
    assert np.array_equal(x.grad.numpy(), g * ((v >= 0) & (v < 1.75)))
    assert quantizer.learned_clip.grad == (g * (v >= 1.75)).sum()


@pytest.mark.parametrize("axis", [None, 1])
def test_signed_formats_are_clipped_on_both_sides(axis):
    spec = QuantSpec(3, axis=axis)
    quantizer = PACT(spec, spec.scale_shape((2, 2, 41)), has_batch=True)
    clips = torch.tensor([0.75, 1.5]).view(2, 1) if axis else torch.full((2, 1), 1.5)
    with torch.no_grad():
        quantizer.learned_clip.copy_(clips.view(1, 2, 1) if axis else torch.tensor(1.5))
    x = (torch.arange(-20, 21) / 8).expand(2, 2, 41).clone().requires_grad_()
    upstream = torch.randint(-3, 4, x.shape).float()
    quantizer(x).backward(upstream)
    top, bottom = clips, clips * (-4 / 3)
    slope = (x >= top) * 1.0 + (x < bottom) * (-4 / 3)
    expected = (upstream * slope).sum((0, 2), keepdim=True)
    if axis is None:
        expected = expected.sum()
    # A third is no dyadic number, so sums of other order differ by ulps.
    torch.testing.assert_close(quantizer.learned_clip.grad, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x.grad, upstream * ((x >= bottom) & (x < top)))


@pytest.mark.parametrize("phase", Phase)
def test_clip_learns_exactly_while_it_quantizes(phase):
    spec = QuantSpec(4, signed=False)
    fake_quant = make_fake_quant(
        "relu", spec, (4, 10), quantizer="pact", observer="min_max", has_batch=True
    )
    fake_quant.set_phase(Phase.OBSERVE)
    fake_quant(torch.linspace(0, 1, 40).view(4, 10))
    fake_quant.finish_calibration()
    fake_quant.set_phase(phase)
    x = torch.linspace(-1, 3, 40).view(4, 10).requires_grad_()
    fake_quant(x).sum().backward()
    (clip,) = fake_quant.quantizer.parameters()
    assert clip == 1
    if phase == Phase.QUANTIZE:
        assert clip.grad == (x >= 1).sum()
    else:
        assert clip.grad is None


def test_clip_driven_negative_stays_positive_and_comes_back():
    quantizer, x = PACT(QuantSpec(4, signed=False), (), has_batch=True), torch.rand(100)
    with torch.no_grad():
        quantizer.learned_clip.fill_(-0.1)
    assert quantizer.scale == MIN_SCALE
    (quantizer(x) - x).square().mean().backward()
    assert quantizer.learned_clip.grad is not None
    assert quantizer.learned_clip.grad < 0  # a step makes it larger


@pytest.mark.parametrize(
    ("spec", "has_batch"),
    [
        (QuantSpec(4), False),
        (QuantSpec(4, signed=False, symmetric=False), True),
        (QuantSpec(4, power_of_two=True), True),
    ],
)
def test_other_sites_are_refused(spec, has_batch):
    with pytest.raises(SpecError, match="PACT on activations that are symmetric"):
        PACT(spec, (), has_batch=has_batch)
