"""What a tensor should become: a number format, the rules that choose it, the scheme of a network.

Everything here is a frozen value that checks itself; nothing here knows a tensor or a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Literal

from qat.errors import SpecError

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
_FORMAT_KEYS = {f.name for f in fields(QuantSpec)} | {"quantizer", "observer"}


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
        SpecError: If a field does not exist.
    """

    match: str = "*"
    weight: Patch = None
    activation: Patch = None
    optional: bool = False

    def __post_init__(self) -> None:
        for patch in (self.weight, self.activation):
            if isinstance(patch, str) and patch != FLOAT:
                raise SpecError(f"expected a format or 'float', got {patch!r} for {self.match!r}.")
            unknown = set(patch) - _FORMAT_KEYS if isinstance(patch, Mapping) else set[str]()
            if unknown:
                raise SpecError(
                    f"expected fields among {sorted(_FORMAT_KEYS)}, got {sorted(unknown)} "
                    f"in the rule for {self.match!r}: remove or correct them."
                )

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
        SpecError: If there is no rule, or ``batch_norm`` or ``functions`` is another word.
    """

    name: str = "custom"
    rules: Mapping[str, Rule] = field(default_factory=_no_rules)
    batch_norm: BatchNormMode = "late"
    functions: FunctionMode = "float"

    def __post_init__(self) -> None:
        if not self.rules:
            raise SpecError(f"expected at least one rule in scheme {self.name!r}, got none.")
        if self.batch_norm not in ("late", "folded"):
            raise SpecError(
                f"expected batch_norm 'late' or 'folded' in scheme {self.name!r}, "
                f"got {self.batch_norm!r}."
            )
        if self.functions not in ("float", "table"):
            raise SpecError(
                f"expected functions 'float' or 'table' in scheme {self.name!r}, "
                f"got {self.functions!r}."
            )
