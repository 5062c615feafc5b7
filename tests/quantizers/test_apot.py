"""APoT and powers of two: levels are the papers', gradients the reparameterised clipping's."""

from itertools import product

import pytest
import torch

from qat.errors import SpecError
from qat.fake_quant import Phase, make_fake_quant
from qat.quantizers import APoT, PowerOfTwo
from qat.spec import QuantSpec

KINDS = [APoT, PowerOfTwo]


def paper_levels(bits):
    """Section 2.2, k = 2: a term is 0 or 2**-i, 2**-(i + n), 2**-(i + 2n) for i = 0 ... n - 1."""
    n = bits // 2
    terms = [[0.0, *(2.0 ** -(i + j * n) for j in range(3))] for i in range(n)]
    sums = sorted(map(sum, product(*terms)))
    return [s / sums[-1] for s in sums]


ODD = {
    1: [[0.0, 1.0]],
    3: [[0.0, 2**-1, 2**-2, 2**-4], [0.0, 2**-3]],
    5: [[0.0, 2**-1, 2**-3, 2**-6], [0.0, 2**-2, 2**-4, 2**-7], [0.0, 2**-5]],
}
"""The exponents of the authors' code, which has a shorter last term there."""


def odd_levels(bits):
    sums = sorted(map(sum, product(*ODD[bits])))
    return [s / sums[-1] for s in sums]


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", range(2, 7))
def test_levels_are_the_papers_times_the_threshold(bits, signed):
    width = bits - signed
    positive = odd_levels(width) if width % 2 else paper_levels(width)
    assert len(set(positive)) == 2**width
    expected = [-v for v in positive[:0:-1]] + positive if signed else positive
    quantizer = APoT(QuantSpec(bits, signed=signed), (), has_batch=True)
    quantizer.set_range(torch.tensor(-2.0), torch.tensor(2.0))
    _, codes = quantizer.table()
    found = codes.double() / codes[-1].double() * 2
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64) * 2)
    values = quantizer(codes * quantizer.scale.detach())
    assert torch.equal(values, codes * quantizer.scale.detach())  # a level stays where it is


@pytest.mark.parametrize("bits", range(2, 5))
def test_powers_of_two_are_0_and_all_halves_of_the_threshold(bits):
    quantizer = PowerOfTwo(QuantSpec(bits), (), has_batch=True)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    positive = [0.0, *sorted(2.0**-i for i in range(2 ** (bits - 1) - 1))]
    expected = torch.tensor([-v for v in positive[:0:-1]] + positive)
    assert torch.equal(quantizer.table()[1] * quantizer.scale, expected)


@pytest.mark.parametrize(
    ("kind", "signed", "widths"),
    [
        (APoT, True, {2: 2, 3: 4, 4: 5, 5: 7, 6: 8}),
        (APoT, False, {2: 3, 3: 4, 4: 6, 5: 7, 6: 9}),
        (PowerOfTwo, True, {2: 2, 3: 4, 4: 8}),
        (PowerOfTwo, False, {2: 3, 3: 7}),
    ],
)
def test_code_format_is_the_narrowest_and_symmetric(kind, signed, widths):
    for bits, width in widths.items():
        spec = QuantSpec(bits, signed=signed, axis=0)
        codes = kind.code_format(spec)
        assert codes == QuantSpec(width, signed=signed, axis=0, narrow=signed)
        top = kind.magnitudes(spec)[-1]
        assert codes.qmax // 2 < top <= codes.qmax


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [QuantSpec(1), QuantSpec(7), QuantSpec(4, symmetric=False)])
def test_other_formats_are_refused(kind, spec):
    with pytest.raises(SpecError, match="symmetric formats of 2 to"):
        kind(spec, (), has_batch=True)


def test_wide_powers_of_two_are_refused():
    with pytest.raises(SpecError, match="8 bits hold"):
        PowerOfTwo(QuantSpec(4, signed=False), (), has_batch=True)


def test_normalising_an_activation_is_refused():
    with pytest.raises(SpecError, match="on weights alone"):
        APoT(QuantSpec(4), (), has_batch=True, normalise=True)


@pytest.mark.parametrize("kind", KINDS)
def test_between_two_levels_the_nearer_is_taken_and_a_tie_goes_up(kind):
    quantizer = kind(QuantSpec(3), (), has_batch=True)  # codes 0, 1, 2, 4 and their negatives
    quantizer.set_scale(torch.tensor(0.25))
    steps = torch.tensor([-9.0, -3.1, -3, -1.5, -1.4, -0.5, 0.4, 0.5, 2.9, 3, 9])
    codes = torch.tensor([-4.0, -4, -2, -1, -1, 0, 0, 1, 2, 4, 4])
    assert torch.equal(quantizer.codes(steps / 4), codes)
    assert torch.equal(quantizer(steps / 4), codes / 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, axis=0)], ids=str)
def test_gradients_are_those_of_the_reparameterised_clipping(kind, spec):
    """dW^/dalpha: Q(W / alpha) - W / alpha inside, the sign beyond; dW^/dW: 1 inside, else 0."""
    quantizer = kind(spec, spec.scale_shape((2, 64)), has_batch=False)
    alpha = torch.tensor([[1.0], [2.0]]) if spec.axis == 0 else torch.tensor(1.0)
    with torch.no_grad():
        quantizer.learned_clip.copy_(alpha)
    x = (torch.randn(2, 64) * 1.5).requires_grad_()
    quantizer(x).sum().backward()
    share = x.detach() / alpha
    inside = share.abs() <= 1
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(x.grad, inside.float())
    slope = torch.where(inside, quantizer(x).detach() / alpha - share, share.sign())
    expected = slope.sum(1, keepdim=True) if spec.axis == 0 else slope.sum()
    # The sum of 128 products, in another order and divided in another place.
    torch.testing.assert_close(quantizer.learned_clip.grad, expected, rtol=1e-5, atol=1e-5)


def test_unsigned_values_below_0_have_no_gradient():
    quantizer = APoT(QuantSpec(4, signed=False), (), has_batch=True)
    x = torch.tensor([-0.5, 0.0, 0.3, 1.5], requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1, 1, 0]))


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, axis=0)], ids=str)
def test_normalised_weights_are_looked_up_without_mean_in_deviations(spec):
    shape = spec.scale_shape((3, 500))
    plain, normal = (
        APoT(spec, shape, has_batch=False, normalise=normalise) for normalise in (False, True)
    )
    x = torch.randn(3, 500) * torch.tensor([[0.1], [1.0], [4.0]]) + 0.5
    normal.follow(x)
    axis = (1,) if spec.axis == 0 else (0, 1)
    mean, deviation = x.mean(axis, keepdim=True), x.std(axis, correction=0, keepdim=True)
    for quantizer in (plain, normal):
        quantizer.learned_clip.data.fill_(3.0)
    plain.follow(x)  # takes nothing
    expected = plain.codes((x - mean) / deviation)
    # Two roundings in another order move a value over a threshold once in a great many times.
    assert (normal.codes(x) != expected).float().mean() < 0.005
    torch.testing.assert_close(normal.scale, (3 * deviation / 10).view(shape))
    assert torch.equal(normal(x), normal.codes(x) * normal.scale)


def test_statistics_follow_the_weight_until_scales_are_frozen():
    fake_quant = make_fake_quant(
        "layer.weight",
        QuantSpec(4),
        (4, 10),
        quantizer="apot",
        observer="min_max",
        has_batch=False,
        options={"normalise": True},
    )
    fake_quant.set_phase(Phase.OBSERVE)
    fake_quant(x := torch.randn(4, 10))
    fake_quant.finish_calibration()
    quantizer = fake_quant.quantizer
    assert isinstance(quantizer, APoT)
    assert torch.equal(quantizer.mean, x.mean())
    reach = (x - x.mean()).abs().max() / x.std(correction=0)
    torch.testing.assert_close(quantizer.learned_clip.detach(), reach)
    for phase, moves in ((Phase.QUANTIZE, True), (Phase.FROZEN, False)):
        fake_quant.set_phase(phase)
        x = x + 1
        fake_quant(x)
        assert torch.equal(quantizer.mean, x.mean()) == moves
        fake_quant.eval()(x + 5)
        assert torch.equal(quantizer.mean, x.mean()) == moves
        fake_quant.train()
