"""Histogram: what several processes, or several observers, saw counts as if one had seen it."""

import numpy as np
import pytest
import torch

from qat.observers import Histogram
from tests.observers.batches import BINS, SPECS, draw, joined, make


def counts_of(observer):
    assert observer._counts is not None
    return observer._counts.clone()


def positions(observer):
    """List where each value of each scale is counted, in ascending order."""
    rows = zip(observer._centres(), counts_of(observer), strict=True)
    return [np.repeat(centres.numpy(), counts.numpy()) for centres, counts in rows]


def observer_of(batches, layout):
    observer = make(Histogram, SPECS[layout])
    for batch in batches:
        observer.observe(batch)
    return observer


def assert_positions(observer, batches, layout, steps):
    """Every value is counted, within ``steps`` half bins of where it is."""
    for found, values in zip(positions(observer), joined(batches, layout), strict=True):
        half_bin = (values.max() - values.min()) / BINS / 2
        moved = np.abs(found - np.sort(values)).max()
        assert moved <= half_bin * steps * (1 + 1e-3)  # 1e-3: float32 bin edges
        assert moved > half_bin / 2  # values do lie off the centres


@pytest.mark.parametrize("layout", SPECS)
def test_values_are_counted_within_half_a_bin_for_each_batch(layout):
    batches = draw()
    assert_positions(observer_of(batches, layout), batches, layout, len(batches))


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("layout", SPECS)
def test_merged_is_what_one_would_have_seen(layout, first):
    batches = draw()
    a, b = observer_of(batches[:first], layout), observer_of(batches[first:], layout)
    seen_by_b = b.low.clone(), b.high.clone(), counts_of(b)
    a.merge(b)
    whole = observer_of(batches, layout)
    assert torch.equal(a.low, whole.low)
    assert torch.equal(a.high, whole.high)
    assert_positions(a, batches, layout, max(first, len(batches) - first) + 1)
    assert all(
        torch.equal(x, y) for x, y in zip((b.low, b.high, counts_of(b)), seen_by_b, strict=True)
    )


@pytest.mark.parametrize("layout", SPECS)
def test_merging_with_what_saw_nothing_changes_nothing(layout):
    seen = observer_of(draw()[:2], layout)
    for a, b in ((make(Histogram, SPECS[layout]), seen), (seen, make(Histogram, SPECS[layout]))):
        low, counts = seen.low.clone(), counts_of(seen)
        a.merge(b)
        assert torch.equal(a.low, low)
        assert torch.equal(counts_of(a), counts)
    nothing = make(Histogram, SPECS[layout])
    nothing.merge(make(Histogram, SPECS[layout]))
    assert nothing.empty


def test_ranks_keep_one_histogram_though_one_alone_sees_wider_values(two_ranks):
    """Edges follow both processes, so that counts of all batches add up bin by bin."""
    script = """
        from qat.observers import Histogram
        from qat.spec import QuantSpec

        observer = Histogram(QuantSpec(4, axis=0), (2, 1))
        torch.manual_seed(1)
        for size in (1, 5, 0.1, 25):
            batch = torch.randn(2, 600)
            batch[:, :300] *= size  # what rank 0 sees
            observer.observe(batch[:, 300 * rank : 300 * (rank + 1)])
        torch.save([observer.low, observer.high, observer._counts], out)
    """
    first, second = two_ranks(script)
    observer = Histogram(SPECS["axis0"], (2, 1))
    torch.manual_seed(1)
    for size in (1, 5, 0.1, 25):
        batch = torch.randn(2, 600)
        batch[:, :300] *= size
        observer.observe(batch)
    one = [observer.low, observer.high, observer._counts]
    for a, b, whole in zip(first, second, one, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, whole)
    assert first[2].sum() == 4 * 2 * 600
