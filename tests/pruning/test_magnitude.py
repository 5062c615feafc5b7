import itertools

import pytest
import torch

from qat.errors import ConfigError
from qat.pruning.magnitude import (
    cubic_ratio,
    n_of_m_mask,
    parse_pattern,
    prune_mask,
    unstructured_mask,
)


@pytest.mark.parametrize("final", [0.0, 0.5, 0.9])
def test_cubic_ramp_is_equation_1(final):
    for step in range(101):
        # s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt))^3 with s_i = 0
        expected = final + (0 - final) * (1 - step / 100) ** 3
        assert cubic_ratio(step / 100, final) == pytest.approx(expected)
    assert cubic_ratio(-0.5, final) == 0
    assert cubic_ratio(0.0, final) == 0
    assert cubic_ratio(1.0, final) == cubic_ratio(7.0, final) == final


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 0.99, 1.0])
def test_unstructured_is_brute_force(ratio):
    weight = torch.randn(5, 3, 2, 2)
    mask = unstructured_mask(weight, ratio)
    count = round(ratio * weight.numel())
    assert mask.shape == weight.shape
    assert mask.unique().tolist() in ([0.0], [1.0], [0.0, 1.0])
    assert int((mask == 0).sum()) == count
    smallest = set(sorted(range(weight.numel()), key=lambda i: abs(weight.flatten()[i]))[:count])
    assert set(torch.nonzero(mask.flatten() == 0).flatten().tolist()) == smallest


def test_equal_magnitudes_still_give_the_ratio():
    assert unstructured_mask(torch.ones(10), 0.3).sum() == 7
    assert n_of_m_mask(torch.zeros(2, 8), 2, 4).sum() == 8


@pytest.mark.parametrize("shape", [(6, 8), (4, 8, 3, 3), (4, 8, 5)])
@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (1, 2), (3, 4), (6, 8), (0, 4)])
def test_n_of_m_is_brute_force_along_the_inputs(shape, zeros, group):
    weight = torch.randn(*shape)
    mask = n_of_m_mask(weight, zeros, group)
    assert mask.shape == weight.shape
    assert mask.is_contiguous()
    spots = list(itertools.product(*(range(n) for n in shape[2:])))
    for out, start in itertools.product(range(shape[0]), range(0, shape[1], group)):
        for spot in spots:
            index = (out, slice(start, start + group), *spot)
            values, kept = weight[index].abs(), mask[index]
            assert int((kept == 0).sum()) == zeros
            if 0 < zeros < group:
                assert values[kept == 0].max() <= values[kept == 1].min()


def test_groups_that_do_not_divide_prune_nothing():
    assert n_of_m_mask(torch.randn(4, 3, 3, 3), 2, 4).all()
    assert n_of_m_mask(torch.randn(8), 2, 4).all()


def test_patterns():
    assert parse_pattern("unstructured") is None
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern("1:16") == (1, 16)


@pytest.mark.parametrize("pattern", ["", "4:2", "2:2", "0:4", "2-4", "structured", "2:4:8", "-1:4"])
def test_patterns_that_make_no_sense(pattern):
    with pytest.raises(ConfigError, match=r"pruning\.pattern"):
        parse_pattern(pattern)


def test_a_pattern_fills_its_groups_step_by_step():
    weight = torch.randn(8, 16)
    shares = [
        1 - prune_mask(weight, r, "2:8").mean().item() for r in (0, 0.12, 0.13, 0.5, 0.75, 0.9)
    ]
    assert shares == [0, 0, 1 / 8, 4 / 8, 6 / 8, 6 / 8]  # never more than the pattern asks for
    assert torch.equal(prune_mask(weight, 0.75, "2:8"), n_of_m_mask(weight, 6, 8))
    assert torch.equal(prune_mask(weight, 0.4, "unstructured"), unstructured_mask(weight, 0.4))


def test_floating_point_thirds_reach_their_group():
    weight = torch.randn(4, 12)
    ratio = 1 - 1 / 3
    assert prune_mask(weight, ratio, "1:3").mean().item() == pytest.approx(1 / 3)
