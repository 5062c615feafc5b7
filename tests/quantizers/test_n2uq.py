"""N2UQ: learned thresholds, uniform levels, one slope for each segment."""

import pytest
import torch

from qat.errors import SpecError
from qat.quantizers import LSQ, N2UQ
from qat.spec import QuantSpec

SPEC = QuantSpec(2, signed=False)
STARTS, WIDTHS = 0.5, torch.tensor([1.0, 0.5, 2.0])
THRESHOLDS = torch.tensor([1.0, 1.75, 3.0])  # the middles of 0.5..1.5, 1.5..2.0, 2.0..4.0


@pytest.fixture
def quantizer():
    made = N2UQ(SPEC, (), has_batch=True)
    with torch.no_grad():
        made.set_scale(torch.tensor(0.25))
        made.start.fill_(STARTS)
        made.widths.copy_(WIDTHS)
    return made


def test_code_counts_the_middles_of_segments_passed(quantizer):
    assert torch.equal(quantizer.table()[0], THRESHOLDS / 4)
    assert torch.equal(quantizer.table()[1], torch.arange(4.0))
    below = THRESHOLDS.nextafter(torch.tensor(0.0))
    x = torch.cat([torch.tensor([-3.0, 0.0]), below, THRESHOLDS, torch.tensor([99.0])]) / 4
    codes = torch.tensor([0.0, 0, 0, 1, 2, 1, 2, 3, 3])
    assert torch.equal(quantizer.codes(x), codes)
    assert torch.equal(quantizer(x), codes / 4)


def expected_code(v, start, widths):
    """Return the line from code to code, one segment after the other."""
    total, left = torch.zeros_like(v), start
    for width in widths:
        total = total + ((v - left) / width).clamp(0, 1)
        left = left + width
    return total


def test_gradients_are_those_of_the_line_through_the_segments(quantizer):
    x = torch.cat([torch.randn(200) * 0.6, torch.tensor([-2.0, 0.0, 5.0])]).requires_grad_()
    quantizer(x).sum().backward()
    s = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    start = torch.tensor(STARTS, dtype=torch.float64, requires_grad=True)
    widths = WIDTHS.double().requires_grad_()
    y = x.detach().double().requires_grad_()
    line = expected_code(y / s, start, widths)
    # The scale counts twice: in front of the code, which is the rounded one, and under x.
    (s * quantizer.codes(x).double() + s.detach() * line).sum().backward()
    pairs = [
        (x.grad, y.grad),
        (quantizer.learned_scale.grad, s.grad),
        (quantizer.start.grad, start.grad),
        (quantizer.widths.grad, widths.grad),
    ]
    for found, expected in pairs:
        assert expected.abs().sum() > 0
        # Sums of 200 float32 products against float64.
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_slope_is_one_over_the_width_inside_and_0_beyond(quantizer):
    v = torch.tensor([-1.0, 0.4, 0.5, 1.2, 1.6, 2.0, 3.9, 4.0, 9.0])
    x = (v / 4).requires_grad_()
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 1, 1, 2, 0.5, 0.5, 0, 0]))


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(2), QuantSpec(4)], ids=str)
def test_starts_as_a_uniform_grid_over_the_range(spec):
    low, high = torch.tensor(-1.0), torch.tensor(6.3)
    quantizer, uniform = N2UQ(spec, (), has_batch=True), LSQ(spec, (), has_batch=True)
    with torch.no_grad():
        quantizer.start.fill_(5.0)
        quantizer.widths.mul_(3)
    quantizer.set_range(low, high)
    uniform.set_range(low, high)
    x = (torch.randn(1000) * 4).requires_grad_()
    assert torch.equal(quantizer(x), uniform(x))
    quantizer(x).sum().backward()
    steps = x.detach() / quantizer.scale.detach()
    inside = (steps >= spec.qmin) & (steps < spec.qmax)
    assert torch.equal(x.grad, inside.float())


def test_widths_driven_negative_stay_positive_and_come_back(quantizer):
    quantizer.widths.data[1] = -5.0
    thresholds, _ = quantizer.table()
    assert torch.equal(thresholds, thresholds.sort().values)
    x = torch.linspace(0, 1, 2000)
    quantizer(x).sum().backward()
    assert quantizer.widths.grad[1] != 0


@pytest.mark.parametrize(
    ("spec", "has_batch"),
    [
        (QuantSpec(1), True),
        (QuantSpec(9, signed=False), True),
        (QuantSpec(4, signed=False, symmetric=False), True),
        (SPEC, False),
    ],
)
def test_other_formats_and_weights_are_refused(spec, has_batch):
    with pytest.raises(SpecError, match="symmetric activations with 2 to 8 bits"):
        N2UQ(spec, (), has_batch=has_batch)
