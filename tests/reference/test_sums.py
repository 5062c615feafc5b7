"""Sums are exact whatever they are made in, and made once for forms that multiply the same."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from qat.graph.convert import convert
from qat.reference import sums
from qat.reference.run import IntegerRun
from qat.reference.sums import SharedSums, exact_sums
from qat.reference.values import Codes, Sum
from qat.subclass import specialise
from tests.helpers import folded, make_scheme
from tests.reference.test_run import grid


class Mixin(nn.Module):
    """Nothing: as a quantized layer has one."""


LAYERS = {
    "linear": (lambda n: nn.Linear(n, 5), (3,)),
    "conv1d": (lambda n: nn.Conv1d(n, 5, 3, padding=1), (3, 7)),
    "conv2d": (lambda n: nn.Conv2d(n, 6, 3, padding=1, padding_mode="reflect"), (2, 5, 4)),
    "grouped": (lambda n: nn.Conv2d(n, 4, 3, groups=2), (2, 5, 4)),
    "transposed": (lambda n: nn.ConvTranspose2d(n, 4, 3), (2, 3, 3)),
}


def at_the_ends(shape, low, high):
    """Return integers of which most are the lowest or the highest, float64."""
    x = torch.randint(low, high + 1, shape).double()
    return torch.where(torch.rand(shape) < 0.7, torch.where(torch.rand(shape) < 0.5, low, high), x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("width", [2, 16, 514, 2310])
@pytest.mark.parametrize("zero_point", [0, 77])
@pytest.mark.parametrize("largest_bias", [0, 2**10, 2**30])
def test_sums_are_those_of_float64(name, width, zero_point, largest_bias):
    torch.manual_seed(width + zero_point)
    make, shape = LAYERS[name]
    layer = make(width)
    weight = at_the_ends(layer.weight.shape, -127, 127)
    weight[0] = weight[0].abs()  # sums that do not cancel
    bias = torch.randint(-largest_bias, largest_bias + 1, layer.bias.shape).int()
    steps = at_the_ends((shape[0], width, *shape[1:]), -zero_point, 255 - zero_point)
    layer.double().weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    with torch.no_grad():
        expected = layer(steps)
        specialise(layer, Mixin)
        codes = Codes(steps.float(), grid(0.1, zero_point))
        found = exact_sums(layer, weight, bias if largest_bias else None, codes)
        expected -= 0 if largest_bias else layer.bias.view(-1, *[1] * (weight.ndim - 2))
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize(("width", "parts"), [(100, 1), (1000, 2), (2000, 4), (4000, 8), (9000, 0)])
def test_a_wide_layer_is_cut_into_as_few_parts_as_float32_holds(width, parts):
    layer = nn.Linear(width, 2)
    specialise(layer, Mixin)
    weight = torch.full((2, width), 127.0, dtype=torch.float64)
    x = Codes(torch.full((1, width), 255.0), grid(0.1, 0))
    with patch.object(sums, "plain_twin", wraps=sums.plain_twin) as twin:
        found = exact_sums(layer, weight, None, x)
    assert found.tolist() == [[width * 127.0 * 255.0] * 2]
    kinds = [call.kwargs["weight"].dtype for call in twin.call_args_list]
    assert kinds == ([torch.float32] * parts or [torch.float64])


def test_sums_are_shared_where_every_factor_is_equal():
    source, made = SharedSums(), []
    reader = SharedSums(source)

    def make():
        made.append(torch.tensor(float(len(made))))
        return made[-1]

    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    first, second = source.get("conv", [a, a], make), source.get("conv", [a, b], make)
    assert reader.get("conv", [a.clone(), b.clone()], make) is second
    assert reader.get("conv", [a.clone(), a.clone()], make) is first
    assert len(made) == 2
    for name, factors in (("other", [a, a]), ("conv", [b, b]), ("conv", [a]), ("conv", [a, a, a])):
        reader.get(name, factors, make)
    assert len(made) == 6
    assert not reader.known


def test_forms_share_sums_and_differences_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten())
    x = torch.randn(4, 2, 6, 6)
    captured, _ = folded(model, make_scheme(), x)
    converted = convert(captured)
    reference = IntegerRun(captured)
    other = IntegerRun(converted, like=reference)
    for batch in (x, x.flip(0), x[:1]):
        expected = reference(batch)
        with patch("qat.reference.kernels.exact_sums", side_effect=AssertionError):
            assert torch.equal(other(batch), expected)
    layer: Any = converted.get_submodule("2")
    layer.weight_codes[0, 0] += 1
    reference(x)
    assert torch.equal(other(x), IntegerRun(converted)(x))
    assert not torch.equal(other(x), reference(x))


@pytest.mark.parametrize("zeros", [(0, 0), (3, 128)])
def test_a_table_of_sums_holds_what_adding_gives(zeros):
    a, b = grid(0.017, zeros[0]), grid(0.0301, zeros[1])
    stored = torch.arange(256.0)
    pairs = torch.cartesian_prod(stored, stored).repeat(2, 1)  # more than there are pairs
    whole = Sum(Codes(pairs[:, 0] - zeros[0], a), Codes(pairs[:, 1] - zeros[1], b))
    rows = Sum(Codes(stored[:, None] - zeros[0], a), Codes(stored - zeros[1], b))
    for target in (grid(0.011, 5), grid(1 / 3, 77)):
        with patch.object(Sum, "_add", autospec=True, side_effect=Sum._add) as add:
            found, expected = whole.codes(target), rows.codes(target)
        assert [len(call.args[1]) for call in add.call_args_list] == [256, 256]
        assert torch.equal(found, expected.flatten().repeat(2))
