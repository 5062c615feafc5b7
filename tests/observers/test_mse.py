"""Mean squared error, against a plain search through all the values."""

import numpy as np
import pytest
import torch

from qat.functional.affine import dequantize, quantize, scale_from_range
from qat.observers import MeanSquaredError
from qat.spec import QuantSpec
from tests.observers.batches import BINS, SPECS, draw, joined, make, observed


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
