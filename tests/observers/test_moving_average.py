"""Moving average, against its recurrence."""

import numpy as np
import pytest
import torch

from qat.observers import MovingAverage
from tests.observers.batches import SHAPE, SPECS, blocks, make, observed


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
