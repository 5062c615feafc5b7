"""Number formats, rules and schemes: what they say of themselves, and what they refuse."""

from dataclasses import FrozenInstanceError, replace

import pytest

from qat.errors import SpecError
from qat.spec import QuantSpec, Rule, Scheme


@pytest.mark.parametrize("bits", range(2, 17))
def test_grid_is_every_reading_of_the_bits(bits):
    patterns = range(2**bits)
    sign = 2 ** (bits - 1)
    unsigned = sorted(patterns)
    signed = sorted((p ^ sign) - sign for p in patterns)  # two's complement
    narrow = sorted(set(signed) & {-code for code in signed})
    for spec, codes in (
        (QuantSpec(bits, signed=False), unsigned),
        (QuantSpec(bits), signed),
        (QuantSpec(bits, narrow=True), narrow),
    ):
        assert (spec.qmin, spec.qmax) == (codes[0], codes[-1])


@pytest.mark.parametrize("bits", range(2, 17))
def test_storage_gain_fills_eight_bits_and_no_more(bits):
    gain = QuantSpec(bits).storage_gain
    if bits <= 8:
        assert gain * QuantSpec(bits).qmin == -128
    else:
        assert gain == 1
    assert QuantSpec(bits, narrow=True).storage_gain == gain
    assert QuantSpec(bits, signed=False).storage_gain == 1
    assert QuantSpec(bits, symmetric=False).storage_gain == 1


@pytest.mark.parametrize(
    ("axis", "group_size", "shape", "expected"),
    [
        (None, None, (8, 4, 3, 3), ()),
        (None, None, (), ()),
        (0, None, (8, 4, 3, 3), (8, 1, 1, 1)),
        (1, None, (8, 4, 3, 3), (1, 4, 1, 1)),
        (1, None, (8, 4), (1, 4)),
        (0, 2, (8, 4, 3, 3), (8, 2, 1, 1)),
        (0, 4, (8, 4), (8, 1)),
        (0, 1, (8, 4), (8, 4)),
    ],
)
def test_scale_shape(axis, group_size, shape, expected):
    assert QuantSpec(8, axis=axis, group_size=group_size).scale_shape(shape) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantSpec(0), "bits from 1 to 16, got bits=0"),
        (lambda: QuantSpec(17), "bits from 1 to 16, got bits=17"),
        (lambda: QuantSpec(8, signed=False, narrow=True), "narrow=true only with signed=true"),
        (lambda: QuantSpec(8, axis=-1), "axis >= 0, got axis=-1"),
        (lambda: QuantSpec(8, axis=0, group_size=0), "got group_size=0, axis=0"),
        (lambda: QuantSpec(8, axis=1, group_size=4), "got group_size=4, axis=1"),
        (lambda: QuantSpec(8, group_size=4), "got group_size=4, axis=None"),
        (lambda: QuantSpec(8, axis=2).scale_shape((4, 4)), r"axis < 2 for shape \(4, 4\), got 2"),
        (
            lambda: QuantSpec(8, axis=0, group_size=3).scale_shape((4, 4)),
            r"divide axis 1 of shape \(4, 4\), got 3",
        ),
        (
            lambda: QuantSpec(8, axis=0, group_size=3).scale_shape((6,)),
            r"divide axis 1 of shape \(6,\), got 3",
        ),
        (lambda: Rule("conv", weight="int8"), "for 'conv' to be a format .* got 'int8'"),  # pyright: ignore[reportArgumentType]
        (
            lambda: Rule("conv", activation={"bit": 8, "bits": 8}),
            "got 'bit' in the activation of the rule for 'conv'",
        ),
        (lambda: Rule("conv", weight=4), "weight of the rule for 'conv' .* got 4"),  # pyright: ignore[reportArgumentType]
        (lambda: Rule(5), "match of a rule to be .* got 5"),  # pyright: ignore[reportArgumentType]
        (lambda: Rule("conv", weight={"bits": "4"}), "bits of weight .* from 1 to 16, got '4'"),
        (lambda: Rule("conv", optional=1), "optional .* true or false, got 1"),  # pyright: ignore[reportArgumentType]
        (lambda: QuantSpec("4"), "bits to be int, got bits='4'"),  # pyright: ignore[reportArgumentType]
        (lambda: Scheme(rules={"all": {}}), "mapping with at least one rule"),  # pyright: ignore[reportArgumentType]
        (lambda: Scheme("mine"), "rules of scheme 'mine' to be .* at least one rule"),
        (
            lambda: Scheme(rules={"all": Rule()}, batch_norm="never"),  # pyright: ignore[reportArgumentType]
            "scheme 'custom' to be late or folded, got 'never'",
        ),
        (
            lambda: Scheme(rules={"all": Rule()}, functions="chip"),  # pyright: ignore[reportArgumentType]
            "scheme 'custom' to be float or table, got 'chip'",
        ),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_format_is_a_value():
    spec = QuantSpec(4, axis=0)
    assert {spec: 1}[QuantSpec(4, axis=0)] == 1
    assert replace(spec, bits=5) != spec
    with pytest.raises(FrozenInstanceError):
        spec.bits = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(8), "i8"),
        (QuantSpec(4, signed=False, symmetric=False), "u4 affine"),
        (QuantSpec(4, axis=0, narrow=True), "i4 channel narrow"),
        (QuantSpec(2, axis=0, group_size=32, power_of_two=True), "i2 group32 pow2"),
    ],
)
def test_format_prints_short(spec, text):
    assert str(spec) == text


@pytest.mark.parametrize(
    ("match", "name", "tags", "expected"),
    [
        ("*", "layer1.0.conv1", (), True),
        ("layer1.*", "layer1.0.conv1", (), True),
        ("layer1.*", "layer10.0.conv1", (), False),
        ("conv1", "layer1.0.conv1", (), False),
        ("*.conv?", "layer1.0.conv1", (), True),
        ("layer[12].*", "layer2.fc", (), True),
        ("layer[12].*", "layer3.fc", (), False),
        ("Conv1", "conv1", (), False),
        ("fc | conv1", "conv1", (), True),
        ("fc|conv1", "conv2", (), False),
        ("@conv2d", "stem", ("conv2d", "first"), True),
        ("@first|@last", "fc", ("linear", "last"), True),
        ("@conv", "stem", ("conv2d",), False),
        ("@*", "stem", ("conv2d",), False),
        ("fc | @to:add", "relu", ("relu", "to:add"), True),
        ("first", "stem", ("first",), False),
        ("@stem", "stem", (), False),
    ],
)
def test_rule_matches_names_and_tags(match, name, tags, expected):
    assert Rule(match).matches(name, frozenset(tags)) is expected
