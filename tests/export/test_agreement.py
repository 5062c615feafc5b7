"""How far two models agree, in numbers that are worked out by hand."""

import pytest
import torch

from qat.export.agreement import compare_outputs, compare_values, paired_interval

NAN, INF = float("nan"), float("inf")


def test_outputs_by_hand():
    reference = torch.tensor([[0.0, 1.0], [0.5, 0.25], [0.0, -1.0], [0.3, 0.2]])
    other = reference.clone()
    other[1] = torch.tensor([0.5, 0.6])  # the prediction turns; largest difference 0.35
    agreement, difference = compare_outputs(reference, other)
    assert agreement == 0.75
    assert difference == pytest.approx(0.35 / 2 * 255)
    assert compare_outputs(reference, reference) == (1.0, 0.0)


def test_outputs_that_are_all_alike_divide_by_nothing():
    agreement, difference = compare_outputs(torch.zeros(2, 3), torch.zeros(2, 3))
    assert (agreement, difference) == (1.0, 0.0)


def test_outputs_that_are_not_finite_never_agree():
    bad = torch.full((2, 3), float("nan"))
    assert compare_outputs(bad, bad)[0] == 0.0


def interval(gained, lost, count):
    """Return the interval written out for numbers of samples that only one model has right."""
    n, b, c = count + 2, gained + 0.5, lost + 0.5
    middle, spread = (b - c) / n, ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    return [
        100 * v for v in ((gained - lost) / count, middle - 1.96 * spread, middle + 1.96 * spread)
    ]


@pytest.mark.parametrize(("gained", "lost", "count"), [(0, 0, 100), (3, 1, 50), (0, 40, 200)])
def test_paired_interval_by_hand(gained, lost, count):
    reference, other = (torch.zeros(count, dtype=torch.bool) for _ in range(2))
    reference[:lost] = True
    other[lost : lost + gained] = True
    reference[-5:] = other[-5:] = True  # what both have right says nothing
    found = paired_interval(reference, other)
    assert list(found) == pytest.approx(interval(gained, lost, count), rel=1e-4)
    assert found.low < found.value < found.high or gained == lost


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 300, generator=generator)
    gained, lost = draws < 0.03, draws > 0.95  # the truth: -2 points
    ends = [paired_interval(b, a) for a, b in zip(gained, lost, strict=True)]
    covered = sum(e.low <= -2.0 <= e.high for e in ends) / len(ends)
    assert covered == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 2000) ** 0.5 + 0.01)


@pytest.mark.parametrize(
    ("ours", "theirs", "agreement", "largest"),
    [
        ([0.0, 10.0], [0.0, 10.0], 1.0, 0.0),
        ([0.0, 10.0], [0.09, 10.0], 1.0, 2.295),  # below a hundredth of the range
        ([0.0, 10.0], [0.2, 10.0], 0.5, 5.1),
        ([0.0, 10.0, -INF, NAN], [0.0, 10.0, -INF, NAN], 1.0, 0.0),
        ([0.0, 10.0, -INF], [0.0, 10.0, 0.0], 2 / 3, INF),
        ([0.0, 10.0], [NAN, 10.0], 0.5, INF),
        ([3, 4], [3, 5], 0.5, 255.0),  # integers are equal or not
        ([True, False], [True, True], 0.5, 255.0),
        ([2.0, 2.0], [2.0, 2.5], 0.5, 0.5 / 1e-12 * 255),  # far off where there is no range
        ([], [], 1.0, 0.0),
        ([0.0], [[0.0]], 0.0, INF),
    ],
)
def test_values_of_an_output_agree_within_a_hundredth_of_its_range(
    ours, theirs, agreement, largest
):
    found = compare_values(torch.tensor(ours), torch.tensor(theirs))
    assert found == pytest.approx((agreement, largest), rel=1e-5)
