"""Percentile, against the sorted values."""

import math

import numpy as np
import pytest
import torch

from qat.observers import Percentile
from qat.spec import QuantSpec
from tests.observers.batches import BINS, SPECS, blocks, draw, joined, make, observed


@pytest.mark.parametrize("layout", SPECS)
def test_percentile_is_the_quantile_within_its_bins(layout):
    """Each value was moved by at most half a bin when counted and in each rebinning after."""
    batches, tail = draw(), 0.0035
    result = observed(make(Percentile, SPECS[layout], percentile=99.3), batches)
    for (low, high), values in zip(result, joined(batches, layout), strict=True):
        ordered = np.sort(values)
        half_bin = (ordered[-1] - ordered[0]) / BINS / 2
        bound = half_bin * len(batches) * (1 + 1e-3)  # 1e-3: float32 bin edges
        assert abs(low - ordered[math.floor(tail * len(ordered))]) <= bound
        assert abs(high - ordered[math.ceil((1 - tail) * len(ordered)) - 1]) <= bound


@pytest.mark.parametrize("layout", SPECS)
def test_percentile_of_one_batch_is_within_half_a_bin(layout):
    x = draw()[0]
    result = observed(make(Percentile, SPECS[layout], percentile=100.0), [x])
    for (low, high), values in zip(result, blocks(x, layout), strict=True):
        half_bin = (values.max() - values.min()) / BINS / 2
        assert low - values.min() == pytest.approx(half_bin, rel=1e-2)
        assert values.max() - high == pytest.approx(half_bin, rel=1e-2)


def test_counts_go_on_beyond_the_whole_numbers_of_float32():
    """Zeros of three batches must weigh three times; float32 would stop counting at 2**24."""
    zeros = 3 * 2**23
    ones = 200_000
    tail = 0.01
    assert ones / (ones + zeros) < tail < ones / (ones + 2**24)
    observer = Percentile(QuantSpec(8), (), percentile=100 * (1 - 2 * tail))
    observer.observe(torch.ones(ones))
    for _ in range(3):
        observer.observe(torch.zeros(()).expand(2**23))
    assert float(observer.range()[1]) < 1 / BINS
