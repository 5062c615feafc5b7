"""Entropy, against the sums of the talk written out bin by bin."""

import math

import numpy as np
import pytest
import torch

from qat.functional.affine import scale_from_range
from qat.observers import Entropy
from qat.observers.entropy import entropy_loss
from qat.spec import QuantSpec
from tests.observers.batches import SHAPE, make

FORMATS = [
    QuantSpec(4),
    QuantSpec(2, narrow=True),
    QuantSpec(3, signed=False),
    QuantSpec(3, signed=False, symmetric=False),
    QuantSpec(8),
]


def test_divergence_by_hand():
    """Codes 0 0 1 1 1, then two bins clipped onto the last one that holds anything."""
    counts = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, 5.0, 1.0]], dtype=torch.float64)
    codes = torch.tensor([[0.0, 0, 1, 1, 1, 1, 1]])
    inside = torch.tensor([[True] * 5 + [False] * 2])
    p, q = [3 / 14, 1 / 14, 2 / 14, 8 / 14], [2 / 8, 2 / 8, 2 / 8, 2 / 8]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(entropy_loss(counts, codes, inside)) == pytest.approx(expected, rel=1e-12)


def test_one_bin_for_a_code_loses_nothing_and_nothing_inside_loses_all():
    counts = torch.tensor([[3.0, 1.0, 2.0]] * 2, dtype=torch.float64)
    codes = torch.arange(3.0).expand(2, 3)
    inside = torch.tensor([[True] * 3, [False] * 3])
    assert entropy_loss(counts, codes, inside).tolist() == [0.0, math.inf]


def divergence(counts, centres, low, high, spec):
    """Return KL(P || Q) of a range, by loops over bins and codes."""
    scale, zero_point = (float(t) for t in scale_from_range(low, high, spec))
    codes = [round(float(np.float32(c) / np.float32(scale))) + zero_point for c in centres]
    kept = [i for i, c in enumerate(codes) if spec.qmin <= c <= spec.qmax and counts[i]]
    if not kept:
        return math.inf
    p = {i: float(counts[i]) for i in kept}
    p[kept[0]] += sum(counts[: kept[0]])
    p[kept[-1]] += sum(counts[kept[-1] + 1 :])
    q = {}
    for code in {codes[i] for i in kept}:
        bins = [i for i in kept if codes[i] == code]
        for i in bins:
            q[i] = sum(counts[j] for j in bins) / len(bins)
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(p[i] / total_p * math.log(p[i] / total_p * total_q / q[i]) for i in kept)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_range_has_the_least_divergence_of_all_candidates(spec):
    x = torch.randn(5000).exp() * torch.randn(5000).sign()
    x = x if spec.signed or not spec.symmetric else x.abs()
    observer = Entropy(spec, (), candidates=41)
    observer.bins = 256
    observer.observe(x)
    low, high = observer.range()
    assert observer._counts is not None
    counts, centres = observer._counts[0].tolist(), observer._centres()[0].tolist()
    losses = {
        f: divergence(counts, centres, x.min() * f, x.max() * f, spec)
        for f in torch.linspace(1 / 16, 1, 41).tolist()
    }
    found = min(losses, key=lambda f: abs(float(x.max()) * f - float(high)))
    assert float(low) == pytest.approx(float(x.min()) * found, rel=1e-6)
    # The tolerance is that of two sums of floats in another order.
    assert losses[found] <= min(losses.values()) * (1 + 1e-9)
    assert losses[found] < losses[1.0] or spec.bits == 8


def test_outliers_are_cut_off_and_a_flat_distribution_is_kept_whole():
    observer = Entropy(QuantSpec(4), ())
    observer.observe(torch.cat([torch.randn(100_000), torch.tensor([40.0])]))
    assert float(observer.range()[1]) < 8
    observer.reset()
    observer.observe(torch.linspace(-1, 1, 100_000))
    # A grid of 4 bits ends half a step, a fifteenth of the range, beyond its last code.
    assert float(observer.range()[1]) > 0.9


def test_each_scale_has_its_own_range():
    spec = QuantSpec(4, axis=0)
    x = torch.randn(SHAPE) * torch.tensor([1.0, 5.0, 0.2, 30.0]).view(4, 1, 1)
    together = make(Entropy, spec)
    together.observe(x)
    for channel, high in zip(x, together.range()[1].flatten(), strict=True):
        alone = Entropy(QuantSpec(4), ())
        alone.observe(channel)
        assert torch.equal(alone.range()[1], high)
