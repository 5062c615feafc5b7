"""Observers: each against a plain search through all the values it saw."""

import math

import numpy as np
import pytest
import torch

from qat.functional.affine import dequantize, quantize, scale_from_range
from qat.observers import (
    OBSERVERS,
    MeanMagnitude,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
)
from qat.spec import QuantSpec

SHAPE = (4, 6, 501)
BINS = 2048
SPECS = {
    "tensor": QuantSpec(4),
    "axis0": QuantSpec(4, axis=0),
    "axis1": QuantSpec(4, axis=1),
    "group": QuantSpec(4, axis=0, group_size=2),
}


def blocks(x, layout):
    """List the values that share one scale, in the order of the scale's entries."""
    x = x.numpy()
    if layout == "tensor":
        return [x.ravel()]
    if layout == "axis0":
        return [x[o].ravel() for o in range(4)]
    if layout == "axis1":
        return [x[:, i].ravel() for i in range(6)]
    return [x[o, i : i + 2].ravel() for o in range(4) for i in range(0, 6, 2)]


def draw():
    """Draw batches whose range grows fourfold each time and then shrinks again."""
    return [torch.randn(SHAPE) * size for size in (0.1, 0.4, 1.6, 6.4, 0.05)]


def joined(batches, layout):
    """Put the batches together, block by block."""
    parts = zip(*(blocks(batch, layout) for batch in batches), strict=True)
    return [np.concatenate(part) for part in parts]


def observed(observer, batches):
    for batch in batches:
        observer.observe(batch)
    low, high = observer.range()
    assert low.shape == high.shape == observer.low.shape
    return zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)


def make(kind, spec, **options):
    return kind(spec, spec.scale_shape(SHAPE), **options)


@pytest.mark.parametrize("layout", SPECS)
def test_min_max_covers_everything_seen(layout):
    batches = draw()
    expected = [(values.min(), values.max()) for values in joined(batches, layout)]
    assert list(observed(make(MinMax, SPECS[layout]), batches)) == expected


@pytest.mark.parametrize("layout", SPECS)
def test_moving_average_starts_at_the_first_batch_and_follows(layout):
    """Whole numbers times 64 and a quarter of the newest: three steps stay exact in float32."""
    batches = [torch.randint(-9, 10, SHAPE).float() * 64 * (i + 1) for i in range(4)]
    expected = None
    for batch in batches:
        ends = np.array([(values.min(), values.max()) for values in blocks(batch, layout)])
        expected = ends if expected is None else expected + (ends - expected) / 4
    assert expected is not None
    result = observed(make(MovingAverage, SPECS[layout], momentum=0.25), batches)
    assert np.array_equal(np.array(list(result)), expected)


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


def root_mean_square(low, high, values, spec):
    """Quantize ``values`` over a range and return the error."""
    x = torch.tensor(values)
    scale, zero_point = scale_from_range(torch.tensor(low), torch.tensor(high), spec)
    codes = quantize(x, scale, zero_point, spec.qmin, spec.qmax)
    return float((dequantize(codes, scale, zero_point) - x).double().square().mean().sqrt())


@pytest.mark.parametrize("streamed", [False, True], ids=["once", "streamed"])
@pytest.mark.parametrize(
    "spec",
    [*SPECS.values(), QuantSpec(4, signed=False, symmetric=False), QuantSpec(2, signed=False)],
    ids=[*SPECS, "affine", "unsigned"],
)
def test_mse_is_as_good_as_a_search_through_the_values(spec, streamed):
    """The error of one value is its distance to the grid, which moves no faster than the value.

    So values moved by at most ``d`` change the root mean square of each candidate by at most
    ``d``, and the winner among moved values misses the true one by at most ``2 * d``.
    """
    layout = next((name for name, other in SPECS.items() if other is spec), "tensor")
    batches = draw()
    if not spec.signed:
        batches = [batch.abs() for batch in batches]
    if not streamed:
        batches = batches[3:4]
    result = observed(make(MeanSquaredError, spec), batches)
    for (low, high), values in zip(result, joined(batches, layout), strict=True):
        ends = float(values.min()), float(values.max())
        fractions = np.linspace(0.04, 1, 80)
        errors = [root_mean_square(ends[0] * f, ends[1] * f, values, spec) for f in fractions]
        moved = (ends[1] - ends[0]) / BINS / 2 * len(batches)
        found = root_mean_square(low, high, values, spec)
        assert found <= min(errors) + 2 * moved
        if not streamed:  # then the bound is narrower than what the search can win
            assert found < errors[-1] - 2 * moved


@pytest.mark.parametrize("name", OBSERVERS)
def test_reset_forgets(name):
    spec = SPECS["axis1"]
    used, fresh = make(OBSERVERS[name], spec), make(OBSERVERS[name], spec)
    assert used.empty
    used.observe(torch.randn(SHAPE) * 100)
    assert not used.empty
    used.reset()
    assert used.empty
    x = torch.randn(SHAPE)
    assert list(observed(used, [x])) == list(observed(fresh, [x]))


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "unit_range"])
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_constant_tensor_has_a_finite_range_that_holds_it(name, value):
    spec = QuantSpec(8)
    observer = OBSERVERS[name](spec, ())
    observer.observe(torch.full((10,), value))
    scale, zero_point = scale_from_range(*observer.range(), spec)
    snapped = dequantize(
        quantize(torch.tensor(value), scale, zero_point, spec.qmin, spec.qmax), scale, zero_point
    )
    assert abs(float(snapped) - value) <= float(scale) / 2


def test_unit_range_is_0_to_1_whatever_was_seen():
    observer = OBSERVERS["unit_range"](QuantSpec(8, signed=False), ())
    assert observer.empty
    observer.observe(torch.tensor([-0.2, 0.3]))
    assert not observer.empty
    assert [v.item() for v in observer.range()] == [0.0, 1.0]


@pytest.mark.parametrize("name", OBSERVERS)
def test_state_is_complete_and_shaped_at_birth(name):
    observer = make(OBSERVERS[name], SPECS["group"])
    shapes = {key: tuple(value.shape) for key, value in observer.state_dict().items()}
    assert shapes == {"low": (4, 3, 1), "high": (4, 3, 1)}
    observer.observe(torch.randn(SHAPE))
    fresh = make(OBSERVERS[name], SPECS["group"])
    fresh.load_state_dict(observer.state_dict())
    assert torch.equal(fresh.low, observer.low)
    assert torch.equal(fresh.high, observer.high)


def test_two_ranks_arrive_at_the_range_of_all_samples(two_ranks):
    script = """
        from qat.observers import OBSERVERS
        from qat.spec import QuantSpec

        result = {}
        for name, kind in OBSERVERS.items():
            observer = kind(QuantSpec(4), ())
            torch.manual_seed(1)
            for size in (1, 3):
                observer.observe((torch.randn(8, 500) * size)[rank::2])
            result[name] = torch.stack(observer.range())
        torch.save(result, out)
    """
    first, second = two_ranks(script)
    for name, kind in OBSERVERS.items():
        observer = kind(QuantSpec(4), ())
        torch.manual_seed(1)
        for size in (1, 3):
            observer.observe(torch.randn(8, 500) * size)
        expected = torch.stack(observer.range())
        assert torch.equal(first[name], second[name]), name
        # Only sums of floats depend on the order.
        rel = 1e-6 if name == "mean_magnitude" else 0
        torch.testing.assert_close(first[name], expected, rtol=rel, atol=0, msg=name)
