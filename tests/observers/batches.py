"""Batches whose range changes, and what an observer should say of them."""

import numpy as np
import torch

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
