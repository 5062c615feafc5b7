"""Unit range: a share is between 0 and 1."""

import torch

from qat.observers import OBSERVERS
from qat.spec import QuantSpec


def test_unit_range_is_0_to_1_whatever_was_seen():
    observer = OBSERVERS["unit_range"](QuantSpec(8, signed=False), ())
    assert observer.empty
    observer.observe(torch.tensor([-0.2, 0.3]))
    assert not observer.empty
    assert [v.item() for v in observer.range()] == [0.0, 1.0]
