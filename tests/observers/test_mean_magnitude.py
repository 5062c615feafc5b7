"""Mean magnitude, against the formula of LSQ over all values."""

import math

import numpy as np
import pytest
import torch

from qat.functional.affine import scale_from_range
from qat.observers import MeanMagnitude
from qat.spec import QuantSpec
from tests.observers.batches import SPECS, draw, joined, make, observed


@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("signed", [True, False])
def test_mean_magnitude_gives_the_initial_scale_of_lsq(layout, signed):
    """Section 2.1: 2 <|v|> / sqrt(Q_P). The tolerance is float32's, over sums in any order."""
    spec = QuantSpec(4, signed, axis=SPECS[layout].axis, group_size=SPECS[layout].group_size)
    batches = [batch if signed else batch.abs() for batch in draw()]
    observer = make(MeanMagnitude, spec)
    list(observed(observer, batches))
    scale, zero_point = scale_from_range(*observer.range(), spec)
    top = 7 if signed else 15
    for got, values in zip(scale.flatten(), joined(batches, layout), strict=True):
        expected = 2 * np.abs(values.astype(np.float64)).mean() / math.sqrt(top)
        assert float(got) == pytest.approx(expected, rel=2e-6)
    assert not zero_point.any()


def test_mean_magnitude_of_an_affine_grid_starts_at_the_lowest_value():
    spec = QuantSpec(4, signed=False, symmetric=False)
    x = torch.rand(1000) * 5 - 1
    observer = MeanMagnitude(spec, ())
    observer.observe(x)
    scale, zero_point = scale_from_range(*observer.range(), spec)
    expected = float(2 * x.abs().double().mean() / math.sqrt(15))
    assert float(scale) == pytest.approx(expected, rel=2e-6)
    assert float(zero_point) == round(-float(x.min()) / expected)
