"""The plan: what a scheme means for one model, as a value to print, save and compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qat.quantizers import QUANTIZERS, Deployable
from qat.spec import BatchNormMode, QuantSpec

FLOAT_BYTES = 4  # of a float32 value, which scales are, too


@dataclass(frozen=True)
class Format:
    """A number format with the names of the parts that find and use its scale."""

    spec: QuantSpec
    quantizer: str
    observer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the quantizer takes beyond its format."""

    @property
    def deployable(self) -> Deployable:
        """In what form a runtime can have it."""
        return QUANTIZERS[self.quantizer].deployable

    def __str__(self) -> str:
        return f"{self.spec}, {self.quantizer}/{self.observer}"


@dataclass(frozen=True)
class WeightSite:
    """One layer whose weight becomes integers.

    Attributes:
        layer: The layer's name.
        op: What it does.
        shape: The weight's shape.
        format: The weight's format.
        source: The activation site that the layer reads, or ``None`` if that stays float.
        batch_norm: The batch-norm that will be folded into it, by name.
        batch_norm_mode: Where the weight's grid lies until the fold.
        macs: Multiply-accumulates for one sample.
        module: The module's path in the captured model, where that is not the layer's name.
        inner: It lies inside a module that is left whole, and quantizes its input by itself.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    format: Format
    source: str | None
    batch_norm: str | None
    batch_norm_mode: BatchNormMode
    macs: int
    module: str = ""
    inner: bool = False

    def within(self, module: object) -> bool:
        """Whether the layer lies inside a module, given by its path."""
        return self.path.startswith(f"{module}.")

    @property
    def path(self) -> str:
        """The module's path in the captured model."""
        return self.module or self.layer

    @property
    def size_bytes(self) -> int:
        """Bytes of the packed codes and of their scales."""
        spec = self.format.spec
        scales = math.prod(spec.scale_shape(self.shape))
        return _packed(math.prod(self.shape), spec.bits) + FLOAT_BYTES * scales

    @property
    def float_bytes(self) -> int:
        """Bytes of the float weight."""
        return FLOAT_BYTES * math.prod(self.shape)


@dataclass(frozen=True)
class ActivationSite:
    """One tensor, or several that share a scale, that becomes integers between layers.

    Attributes:
        name: The site's name.
        op: What makes the tensor.
        shape: Its shape for the example batch, samples on axis 0.
        format: Its format.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    format: Format

    @property
    def size_bytes(self) -> int:
        """Bytes of one sample's packed codes."""
        return _packed(math.prod(self.shape[1:]), self.format.spec.bits)

    @property
    def float_bytes(self) -> int:
        """Bytes of one sample in float."""
        return FLOAT_BYTES * math.prod(self.shape[1:])


def _packed(count: int, bits: int) -> int:
    return -(-count * bits // 8)


@dataclass(frozen=True)
class FloatOp:
    """An operation that stays float, why, and what it costs for one sample."""

    name: str
    op: str
    macs: int
    reason: str


@dataclass(frozen=True)
class Branch:
    """Where a tensor that is codes already is quantized once more, for some of its readers.

    Attributes:
        site: The activation site whose fake-quant stands there.
        readers: Names of the nodes that read behind it.
    """

    site: str
    readers: tuple[str, ...]


@dataclass
class Plan:
    """A scheme applied to one graph; a value that can be printed, saved and compared.

    Attributes:
        scheme: The scheme's name.
        weights: Layer name to site.
        activations: Site name to site.
        placements: Mode to node name to the activation site whose fake-quant stands behind it.
        exact: Mode to node name to the nodes that read it unquantized, for their decisions.
        branches: Mode to node name to what layers read of it in fewer bits than additions.
        batch_norms: Names of all batch-norms that can be frozen.
        floats: What stays float.
        macs: Multiply-accumulates of the whole model for one sample.
        notes: What was changed in the model beforehand, one sentence each.
        idle: Names of rules, with what they say and has no effect.
    """

    scheme: str
    weights: dict[str, WeightSite] = field(default_factory=dict)
    activations: dict[str, ActivationSite] = field(default_factory=dict)
    placements: dict[str, dict[str, str]] = field(default_factory=dict)
    exact: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    branches: dict[str, dict[str, Branch]] = field(default_factory=dict)
    batch_norms: list[str] = field(default_factory=list)
    floats: list[FloatOp] = field(default_factory=list)
    macs: int = 0
    notes: list[str] = field(default_factory=list)
    idle: list[tuple[str, str]] = field(default_factory=list)

    @property
    def float_share(self) -> float:
        """Share of the multiply-accumulates that stays float, 0 to 1."""
        return sum(f.macs for f in self.floats) / self.macs if self.macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "float_share": self.float_share}
