"""What a tensor should become: a number format, the rules that choose it, the scheme of a network.

Everything here is a frozen value that checks itself; nothing here knows a tensor or a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, cast

from qat.errors import SpecError
from qat.kinds import FLAG, NULL, WORD, Kind, require, whole, words

MIN_BITS, MAX_BITS = 1, 16
BatchNormMode = Literal["late", "folded"]
FunctionMode = Literal["float", "table"]
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "bits": (int,),
    "signed": (bool,),
    "symmetric": (bool,),
    "axis": (int, type(None)),
    "group_size": (int, type(None)),
    "narrow": (bool,),
    "power_of_two": (bool,),
}


@dataclass(frozen=True)
class QuantSpec:
    """One integer number format: real value = ``scale * (code - zero_point)``.

    Args:
        bits: Width of a code, 1 to 16.
        signed: Codes from ``-2**(bits-1)`` instead of from 0; with 1 bit, the codes -1 and 1.
        symmetric: The zero point is 0; otherwise it is an integer of the grid (affine).
        axis: Axis of the tensor with one scale per index; ``None`` for one scale per tensor.
        group_size: Also one scale per so many consecutive indices of axis 1 (needs ``axis=0``).
        narrow: Leave out the lowest signed code, so that every code can change its sign.
        power_of_two: Scales are powers of two, so that rescaling is a shift.

    Raises:
        SpecError: If a value is out of range or two of them contradict each other.
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    axis: int | None = None
    group_size: int | None = None
    narrow: bool = False
    power_of_two: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SpecError(
                f"expected bits from {MIN_BITS} to {MAX_BITS}, got bits={self.bits}: "
                "choose a width in that range, or 'float' to leave the tensor alone."
            )
        if self.axis is not None and self.axis < 0:
            raise SpecError(
                f"expected axis >= 0, got axis={self.axis}: "
                "count axes from the front, or leave axis out for one scale per tensor."
            )
        if self.narrow and not self.signed:
            raise SpecError(
                "expected narrow=true only with signed=true, got signed=false: "
                "unsigned codes have no lowest negative code to leave out; drop narrow."
            )
        if self.group_size is not None and (self.group_size < 1 or self.axis != 0):
            raise SpecError(
                "expected group_size >= 1 together with axis=0, "
                f"got group_size={self.group_size}, axis={self.axis}: set axis=0."
            )

    def _check_types(self) -> None:
        for name, kinds in _FIELD_TYPES.items():
            value = getattr(self, name)
            if type(value) not in kinds:
                wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
                raise SpecError(
                    f"expected {name} to be {wanted}, got {name}={value!r}: correct the value."
                )

    @property
    def qmin(self) -> int:
        """Lowest code of the grid."""
        if not self.signed:
            return 0
        return min(-1, -(2 ** (self.bits - 1)) + self.narrow)

    @property
    def qmax(self) -> int:
        """Highest code of the grid."""
        if not self.signed:
            return 2**self.bits - 1
        return max(1, 2 ** (self.bits - 1) - 1)

    @property
    def storage_gain(self) -> int:
        """Power of two by which codes grow when stored in 8 bits, dividing the scale by the same.

        The value stays equal bit for bit; the grid of a bias, whose scale is the product of
        input and weight scale, gets finer by that factor. Affine and wide codes stay as they are.
        """
        return 2 ** (8 - self.bits) if self.bits < 8 and self.signed and self.symmetric else 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale for a tensor of ``shape``: ``()``, or its rank with 1 off the axes.

        Raises:
            SpecError: If the axis does not exist or the groups do not divide axis 1.
        """
        if self.axis is None:
            return ()
        if self.axis >= len(shape):
            raise SpecError(f"expected axis < {len(shape)} for shape {shape}, got {self.axis}.")
        result = [1] * len(shape)
        result[self.axis] = shape[self.axis]
        if self.group_size is not None:
            if len(shape) < 2 or shape[1] % self.group_size:
                raise SpecError(
                    f"expected group_size to divide axis 1 of shape {shape}, "
                    f"got {self.group_size}: choose a divisor, or leave this layer per channel."
                )
            result[1] = shape[1] // self.group_size
        return tuple(result)

    def __str__(self) -> str:
        parts = [f"{'i' if self.signed else 'u'}{self.bits}"]
        if self.axis is not None:
            parts.append("channel" if self.group_size is None else f"group{self.group_size}")
        parts += [] if self.symmetric else ["affine"]
        parts += ["narrow"] if self.narrow else []
        parts += ["pow2"] if self.power_of_two else []
        return " ".join(parts)


FLOAT: Literal["float"] = "float"
Patch = Mapping[str, object] | Literal["float"] | None
NAMED = Kind("a mapping with name and options", lambda value: isinstance(value, Mapping))
FORMAT_KINDS: dict[str, Kind] = {
    "bits": whole(MIN_BITS, MAX_BITS),
    "signed": FLAG | words("auto"),
    "symmetric": FLAG,
    "axis": whole(0) | NULL,
    "group_size": whole(1) | NULL,
    "narrow": FLAG,
    "power_of_two": FLAG,
    "quantizer": WORD | NAMED,
    "observer": WORD,
}
"""What a rule may set, and to what."""
PATCH = Kind(
    "a format such as {bits: 4}, 'float' or null",
    lambda value: value in (FLOAT, None) or isinstance(value, Mapping),
)


@dataclass(frozen=True)
class Rule:
    """Which sites a format is for: a pattern, and what it changes of weights and activations.

    Args:
        match: Glob patterns on site names, or ``@tag``; alternatives are separated by ``|``.
            Tags: an op's name (``@conv2d``), ``@first`` and ``@last`` (that layer's weight and
            its input), ``@input`` (the model's inputs), ``@to:add`` (whatever an add reads, apart
            from layers that read the same in fewer bits).
        weight: Fields of ``QuantSpec`` plus ``quantizer`` and ``observer`` to set on weights,
            ``"float"`` to leave them alone, ``None`` to change nothing.
        activation: The same for activations; ``signed="auto"`` lets the producing op decide.
        optional: It may match nothing, which is an error otherwise.

    Raises:
        SpecError: If a field does not exist, or a value is of another kind.
    """

    match: str = "*"
    weight: Patch = None
    activation: Patch = None
    optional: bool = False

    def __post_init__(self) -> None:
        require("match of a rule", self.match, WORD, SpecError)
        require(f"optional of the rule for {self.match!r}", self.optional, FLAG, SpecError)
        for name, patch in (("weight", self.weight), ("activation", self.activation)):
            where = f"{name} of the rule for {self.match!r}"
            require(where, patch, PATCH, SpecError)
            for key, value in patch.items() if isinstance(patch, Mapping) else ():
                if key not in FORMAT_KINDS:
                    raise SpecError(
                        f"expected fields among {sorted(FORMAT_KINDS)}, got {key!r} in the "
                        f"{where}: remove or correct it."
                    )
                require(f"{key} of {where}", value, FORMAT_KINDS[key], SpecError)

    def matches(self, name: str, tags: frozenset[str]) -> bool:
        """Whether a site with this ``name`` and these ``tags`` is meant."""
        for pattern in map(str.strip, self.match.split("|")):
            if pattern.startswith("@"):
                if pattern[1:] in tags:
                    return True
            elif fnmatchcase(name, pattern):
                return True
        return False


def _no_rules() -> dict[str, Rule]:
    return {}


def _are_rules(value: object) -> bool:
    rules = list(cast("Mapping[str, object]", value).values()) if isinstance(value, Mapping) else []
    return len(rules) > 0 and all(isinstance(rule, Rule) for rule in rules)


RULES = Kind("a mapping with at least one rule", _are_rules)


@dataclass(frozen=True)
class Scheme:
    """What a whole network should become: named rules in order, of which later ones win.

    Args:
        name: How reports call it.
        rules: Name to rule; each rule patches only the fields it names.
        batch_norm: ``"late"`` trains the batch-norm in float behind the quantized layer;
            ``"folded"`` puts the weight grid on the folded weight from the start.
        functions: ``"float"`` leaves what a sigmoid, SiLU, GELU, tanh or softmax reads in float;
            ``"table"`` quantizes it, so that a chip without floats can look the results up.

    Raises:
        SpecError: If there is no rule, or another field is not of its kind.
    """

    name: str = "custom"
    rules: Mapping[str, Rule] = field(default_factory=_no_rules)
    batch_norm: BatchNormMode = "late"
    functions: FunctionMode = "float"

    def __post_init__(self) -> None:
        require("name of a scheme", self.name, WORD, SpecError)
        require(f"rules of scheme {self.name!r}", self.rules, RULES, SpecError)
        where = f"in scheme {self.name!r}"
        require(f"batch_norm {where}", self.batch_norm, words("late", "folded"), SpecError)
        require(f"functions {where}", self.functions, words("float", "table"), SpecError)
