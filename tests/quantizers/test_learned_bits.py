"""Learned bits: the grid of now, the gradients of U3 written out, and bits that follow."""

import math

import pytest
import torch

from qat.errors import SpecError
from qat.functional.affine import dequantize
from qat.quantizers import LearnedBits
from qat.spec import QuantSpec

SHAPE = (3, 40)


def make(spec, step, top, *, has_batch=False):
    """Build a quantizer with step size and range, the latter in steps."""
    quantizer = LearnedBits(spec, spec.scale_shape(SHAPE), has_batch=has_batch)
    with torch.no_grad():
        quantizer.learned_scale.fill_(step)
        quantizer.learned_limit.fill_(step * top)
    return quantizer


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 9])
def test_range_gives_all_bits_of_the_format_and_every_code_comes_back(bits, signed):
    spec = QuantSpec(bits, signed=signed)
    quantizer = LearnedBits(spec, (), has_batch=False)
    quantizer.set_range(
        torch.tensor(-0.25 * spec.qmax if signed else 0.0), torch.tensor(0.25 * spec.qmax)
    )
    assert quantizer.bits_in_use == bits
    codes = torch.arange(quantizer.code_spec.qmin, spec.qmax + 1).float()
    scale = quantizer.scale.detach()
    assert torch.equal(quantizer.codes(codes * scale), codes)
    assert torch.equal(quantizer(codes * scale), codes * scale)
    far = torch.tensor([-1e6, 1e6])
    assert quantizer.codes(far).tolist() == [quantizer.code_spec.qmin, spec.qmax]


@pytest.mark.parametrize("layout", [{}, {"axis": 0}, {"axis": 0, "power_of_two": True}], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("top", [0.2, 1.0, 2.4, 5.0, 6.6, 9.0, 500.0])
def test_forward_is_the_value_of_its_codes_and_they_fit(top, signed, layout):
    spec = QuantSpec(4, signed=signed, **layout)
    quantizer = make(spec, 0.3, top)
    x = torch.randn(SHAPE) * 3
    codes = quantizer.codes(x)
    least, most = (1, 7) if signed else (3, 15)
    wanted = min(max(round(top * 0.3 / quantizer.scale.flatten()[0].item()), least), most)
    assert codes.max() == wanted
    assert codes.min() == (-wanted if signed else 0)
    assert torch.equal(quantizer(x), dequantize(codes, quantizer.scale, quantizer.zero_point))


def test_ties_go_to_the_even_code():
    quantizer = make(QuantSpec(4), 0.5, 5)
    x = torch.tensor([-2.75, -0.75, -0.25, 0.25, 0.75, 1.25, 2.25, 2.75])
    assert quantizer.codes(x).tolist() == [-5, -2, 0, 0, 2, 2, 4, 5]


def by_hand(x, step, top, signed):
    """Return the gradients of U3 for value, step and range, element by element."""
    limit = step * top
    rows = []
    for value in x.flatten().tolist():
        if value > limit:
            rows.append((0.0, 0.0, 1.0))
        elif value < (-limit if signed else 0):
            rows.append((0.0, 0.0, -1.0 if signed else 0.0))
        else:
            rows.append((1.0, round(value / step) - value / step, 0.0))
    return (torch.tensor(column).view(x.shape) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("has_batch", [False, True])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("signed", [True, False])
def test_gradients_are_those_of_the_paper(signed, axis, has_batch):
    """A step of 1/4: quotients are exact. Sums run in another order."""
    quantizer = make(QuantSpec(4, signed=signed, axis=axis), 0.25, 5, has_batch=has_batch)
    x = (torch.randn(SHAPE)).requires_grad_()
    given = torch.randn(SHAPE)
    quantizer(x).backward(given)
    of_x, of_step, of_limit = by_hand(x, 0.25, 5, signed)
    assert (of_limit > 0).any()
    assert (of_x > 0).any()
    assert (of_limit < 0).any() == signed
    assert torch.equal(x.grad, given * of_x)
    shape = quantizer.learned_scale.shape
    for parameter, slope in (
        (quantizer.learned_scale, of_step),
        (quantizer.learned_limit, of_limit),
    ):
        expected = (given * slope).sum(1, keepdim=True) if axis == 0 else (given * slope).sum()
        torch.testing.assert_close(parameter.grad, expected.view(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top", "held"), [(50.0, 7), (0.1, 1)])
def test_range_that_is_held_is_moved_by_the_step(top, held):
    quantizer = make(QuantSpec(4), 0.25, top)
    x = torch.tensor([-4.0, 0.1, 3.0, 9.0])
    quantizer(x).sum().backward()
    _, of_step, of_limit = by_hand(x, 0.25, held, signed=True)
    expected = float(of_step.sum() + held * of_limit.sum())
    assert float(quantizer.learned_scale.grad) == pytest.approx(expected, rel=1e-6)
    # Below the least range it may come back up; above the widest it waits for the step.
    assert float(quantizer.learned_limit.grad) == (float(of_limit.sum()) if top < 1 else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_bits_are_those_of_the_formula_and_their_gradient_skips_the_ceiling(signed):
    for top in range(1, 256):
        quantizer = make(QuantSpec(9, signed=signed), 0.5, top)
        bits = quantizer.bits_in_use
        assert bits.item() == max(2, math.ceil(math.log2(top + 1) + signed))
        bits.backward()
        if top < (1 if signed else 3):
            assert quantizer.learned_limit.grad == 0  # 2 bits cannot become fewer
        else:
            slope = 1 / ((top + 1) * math.log(2))  # of log2(q_max / d + 1) for q_max / d
            assert float(quantizer.learned_limit.grad) == pytest.approx(slope / 0.5, rel=1e-5)
            assert float(quantizer.learned_scale.grad) == pytest.approx(
                -slope * top / 0.5, rel=1e-5
            )


def test_each_channel_has_bits_of_its_own():
    quantizer = make(QuantSpec(4, axis=0), 0.25, 7)
    with torch.no_grad():
        quantizer.learned_limit.copy_(torch.tensor([1.75, 0.75, 0.25]).view(3, 1))
    assert quantizer.bits_in_use.flatten().tolist() == [4, 3, 2]
    assert quantizer.codes(torch.full(SHAPE, 9.0))[:, 0].tolist() == [7, 3, 1]


def test_step_driven_negative_stays_positive():
    quantizer = make(QuantSpec(4), -3.0, 7)
    assert float(quantizer.scale.detach()) > 0
    x = torch.randn(50, requires_grad=True)
    quantizer(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in quantizer.parameters())


def test_state_comes_back():
    quantizer, fresh = make(QuantSpec(4), 0.3, 4.0), make(QuantSpec(4), 1.0, 7.0)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    x = torch.randn(100)
    assert torch.equal(fresh(x), quantizer(x))
    assert fresh.bits_in_use == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 10])
def test_half_floats(bits, dtype):
    quantizer = make(QuantSpec(bits), 0.25, 6)
    x = torch.randn(50, dtype=dtype, requires_grad=True)
    y = quantizer(x)
    assert y.dtype == (dtype if bits == 4 else torch.float32)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize(
    "spec", [QuantSpec(1), QuantSpec(1, signed=False), QuantSpec(4, symmetric=False)]
)
def test_other_formats_are_refused(spec):
    with pytest.raises(SpecError, match="LearnedBits on symmetric formats of 2 bits or more"):
        LearnedBits(spec, (), has_batch=True)


def test_bits_shrink_under_a_penalty_and_the_error_holds_them():
    """A normal weight: the more a bit costs, the fewer there are."""
    w, found = torch.randn(4000), []
    for cost in (0.0, 3e-3, 1.0):
        quantizer = LearnedBits(QuantSpec(8), (), has_batch=False)
        quantizer.set_range(w.min(), w.max())
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (quantizer(w) - w).square().mean() + cost * quantizer.bits_in_use
            loss.backward()
            optimizer.step()
        found.append(int(quantizer.bits_in_use))
    assert found[0] >= 6
    assert found[0] > found[1] > found[2] == 2
