"""Statistics-aware weight binning: its coefficients fitted anew, its range against the formula."""

import math

import numpy as np
import pytest
import torch

from qat.errors import SpecError
from qat.functional.affine import scale_from_range
from qat.observers import StatisticsAware
from qat.observers.sawb import COEFFICIENTS
from qat.spec import QuantSpec
from tests.observers.batches import SPECS, draw, joined, make, observed


def densities():
    """Yield magnitudes and densities of the paper's six distributions, cut far out."""
    unit, far = np.linspace(0, 1, 8001), np.linspace(0, 30, 24001)
    circle = np.linspace(0, math.pi, 8001)
    yield unit, np.ones_like(unit)
    yield unit, 1 - unit
    yield far / 3, np.exp(-((far / 3) ** 2) / 2)
    yield far, np.exp(-far)
    yield far, np.exp(-far) / (1 + np.exp(-far)) ** 2
    yield circle, np.exp(np.cos(circle))


def best_range(x, p, levels):
    """Return the range with the least mean square error, by search."""

    def error(alpha):
        step = alpha / levels
        return float((p * (np.clip(np.round(x / step), 0, levels) * step - x) ** 2).sum())

    candidates = np.linspace(x[-1] / 200, x[-1] * 1.4, 280)
    rough = min(candidates, key=error)
    return min(np.linspace(rough * 0.97, rough * 1.03, 121), key=error)


@pytest.mark.parametrize(("levels", "residual"), [(1, 0.031), (3, 0.027), (7, 0.112)])
def test_coefficients_are_the_fit_to_six_distributions(levels, residual):
    rows, targets = [], []
    for x, density in densities():
        p = density / density.sum()
        magnitude = (p * x).sum()
        rows.append([math.sqrt((p * x**2).sum()) / magnitude, -1])
        targets.append(best_range(x, p, levels) / magnitude)
    fit = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    # Searches and sums here are coarser than those behind the table.
    assert fit == pytest.approx(COEFFICIENTS[levels], rel=2e-2)
    misses = np.abs((np.array(rows) * COEFFICIENTS[levels]).sum(1) / targets - 1)
    assert misses.max() <= residual


@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, True), (4, True), (2, False)])
def test_range_is_the_formula_over_all_values(bits, signed, layout):
    spec = QuantSpec(bits, signed, axis=SPECS[layout].axis, group_size=SPECS[layout].group_size)
    batches = draw()
    result = observed(make(StatisticsAware, spec), batches)
    c1, c2 = COEFFICIENTS[spec.qmax]
    for (low, high), values in zip(result, joined(batches, layout), strict=True):
        x = values.astype(np.float64)
        alpha = c1 * math.sqrt((x**2).mean()) - c2 * np.abs(x).mean()
        assert np.abs(x).mean() < alpha < np.abs(x).max()
        assert high == pytest.approx(alpha, rel=1e-5)  # float32 sums, and a difference
        assert low == -high


def test_scale_of_a_normal_weight_is_close_to_the_best_one():
    """1.224 standard deviations for -1, 0, 1 (Max 1960); the fit misses by 3 percent at most."""
    spec = QuantSpec(2, narrow=True)
    observer = StatisticsAware(spec, ())
    observer.observe(torch.randn(200_000))
    scale, _ = scale_from_range(*observer.range(), spec)
    assert float(scale) == pytest.approx(1.224, rel=0.032)


def test_range_stays_between_mean_and_largest_magnitude():
    observer = StatisticsAware(QuantSpec(8), ())
    observer.observe(torch.tensor([1.0, -1.0, 1.0, 1.25]))  # nearly one magnitude: c2 outweighs c1
    assert float(observer.range()[1]) == 1.0625
    observer = StatisticsAware(QuantSpec(2), ())
    observer.observe(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]))
    assert float(observer.range()[1]) == pytest.approx(2.5318 / 8**0.5 - 1.6109 / 8, rel=1e-6)
    observer.observe(torch.zeros(92))
    assert float(observer.range()[1]) == pytest.approx(0.1 * 2.5318 - 0.016109, rel=1e-6)


def test_affine_grid_is_cut_to_what_was_seen():
    observer = StatisticsAware(QuantSpec(3, signed=False, symmetric=False), ())
    x = torch.randn(10_000).clamp(min=-0.5)
    observer.observe(x)
    c1, c2 = COEFFICIENTS[3]
    alpha = c1 * float(x.square().mean().sqrt()) - c2 * float(x.abs().mean())
    low, high = observer.range()
    assert float(low) == -0.5
    assert float(high) == pytest.approx(alpha, rel=1e-4)


def test_wide_formats_are_refused():
    with pytest.raises(SpecError, match="at most 8 bits for the observer sawb, got i9"):
        StatisticsAware(QuantSpec(9), ())
