"""Small floats: against PyTorch's own types, value by value, and against written-out tables."""

import pytest
import torch

from qat.functional.float_formats import FLOAT_FORMATS, floor_power_of_two, round_to_float

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TABLES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [
        *[0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875],
        *[1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875],
        *[2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75],
        *[4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5],
    ],
    "e3m2": [
        *[0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375],
        *[0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75],
        *[2, 2.5, 3, 3.5, 4, 5, 6, 7],
        *[8, 10, 12, 14, 16, 20, 24, 28],
    ],
}


def torch_values(name):
    """Return the finite numbers of one of PyTorch's types, ascending, each once."""
    values = torch.arange(256, dtype=torch.uint8).view(TORCH[name]).float()
    return values[values.isfinite()].unique()


def around(x):
    """Return ``x`` and its float32 neighbours on both sides."""
    ends = torch.tensor([[-torch.inf], [torch.inf]])
    return torch.cat([x, torch.nextafter(x, ends[0]), torch.nextafter(x, ends[1])])


@pytest.mark.parametrize("name", TORCH)
def test_every_value_and_every_tie_is_rounded_as_by_torch(name):
    values = torch_values(name)
    assert len(values) == {"e4m3": 253, "e5m2": 247}[name]
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat([around(values), around(ties), torch.randn(10_000) * values[-1] / 4])
    x = x[x.abs() <= values[-1]]
    assert len(x) > 1500 + 9000
    assert torch.equal(round_to_float(x, FLOAT_FORMATS[name]), x.to(TORCH[name]).float())


@pytest.mark.parametrize("name", TABLES)
def test_every_value_and_every_tie_is_rounded_as_the_table_says(name):
    table = torch.tensor(TABLES[name], dtype=torch.float32)
    form = FLOAT_FORMATS[name]
    assert torch.equal(round_to_float(table, form), table)
    assert torch.equal(round_to_float(-table, form), -table)
    ties = (table[1:] + table[:-1]) / 2  # the number with an even last bit stands at even places
    even = torch.tensor([table[i + i % 2] for i in range(len(ties))])
    assert torch.equal(round_to_float(ties, form), even)
    up, down = torch.nextafter(ties, table[1:]), torch.nextafter(ties, table[:-1])
    assert torch.equal(round_to_float(up, form), table[1:])
    assert torch.equal(round_to_float(down, form), table[:-1])


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_format_says_what_its_numbers_are(name):
    form = FLOAT_FORMATS[name]
    values = torch_values(name) if name in TORCH else torch.tensor(TABLES[name])
    assert form.largest == float(values.max())
    assert form.smallest == float(values[values > 0].min())
    assert form.bits == (8 if name in TORCH else {32: 6, 8: 4}[len(values)])
    assert 2.0**form.max_exponent <= form.largest < 2.0 ** (form.max_exponent + 1)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_what_is_beyond_saturates_and_nan_stays(name):
    form = FLOAT_FORMATS[name]
    x = torch.tensor([form.largest * 1.001, form.largest * 50, 3e38, torch.inf])
    assert torch.equal(round_to_float(x, form), torch.full((4,), form.largest))
    assert torch.equal(round_to_float(-x, form), torch.full((4,), -form.largest))
    assert round_to_float(torch.tensor([torch.nan]), form).isnan().all()


def test_floor_power_of_two_is_exact_on_both_sides_of_every_power():
    powers = 2.0 ** torch.arange(-126, 128).double()
    powers = powers.float()
    assert torch.equal(floor_power_of_two(powers), powers)
    assert torch.equal(floor_power_of_two(torch.nextafter(powers, powers * 0 + 3e38)), powers)
    assert torch.equal(floor_power_of_two(torch.nextafter(powers[1:], powers[:1])), powers[:-1])
