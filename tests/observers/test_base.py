"""What holds for every observer; the range of everything seen."""

import pytest
import torch

from qat.functional.affine import dequantize, quantize, scale_from_range
from qat.observers import OBSERVERS, MinMax
from qat.spec import QuantSpec
from tests.observers.batches import SHAPE, SPECS, draw, joined, make, observed


@pytest.mark.parametrize("layout", SPECS)
def test_min_max_covers_everything_seen(layout):
    batches = draw()
    expected = [(values.min(), values.max()) for values in joined(batches, layout)]
    assert list(observed(make(MinMax, SPECS[layout]), batches)) == expected


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
        rel = 1e-6 if name in ("mean_magnitude", "sawb") else 0
        torch.testing.assert_close(first[name], expected, rtol=rel, atol=0, msg=name)
