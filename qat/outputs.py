"""What a model returns: the leaves of its tree, and which of them is the prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec

from qat.errors import ConfigError, GraphError
from qat.trees import Path, build, leaves, name_of, unflatten

ONE_OUTPUT = "output"
"""What a model's one tensor is called, and what stands in front of a place in a tuple."""
LOGITS = "logits"


@dataclass(frozen=True)
class Output:
    """One leaf of what a model returns.

    Attributes:
        path: The way to it.
        shape: For the example; None where it is no tensor.
        has_batch: Whether axis 0 counts samples.
        is_real: Whether it holds floating-point numbers.
        value: What it is where it is no tensor.
    """

    path: Path
    shape: tuple[int, ...] | None
    has_batch: bool = True
    is_real: bool = True
    value: Any = None

    @property
    def name(self) -> str:
        """Its name: ``logits``, ``features.1``, ``output.0`` of a tuple, or ``output`` alone."""
        is_place = not self.path or isinstance(self.path[0], int)
        return name_of((ONE_OUTPUT, *self.path) if is_place else self.path)

    @property
    def shown(self) -> str:
        """Name and shape, for messages."""
        sizes = [*(self.shape or ())]
        if self.has_batch and sizes:
            return f"{self.name} ({', '.join(['N', *map(str, sizes[1:])])})"
        return f"{self.name} ({', '.join(map(str, sizes))})"


class Outputs:
    """What a model returns in one mode.

    Args:
        leaves: In the order of the tree.
        spec: The tree itself; without it, dictionaries and tuples are made in its place.
    """

    def __init__(self, leaves: Iterable[Output], spec: TreeSpec | None = None) -> None:
        self.leaves, self.spec = tuple(leaves), spec

    @staticmethod
    def of(result: Any) -> Outputs:
        """Return the leaves of what a model returned for one batch."""
        return Outputs(describe_leaf(path, (x, x)) for path, x in leaves(result))

    @property
    def tensors(self) -> list[Output]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if leaf.shape is not None]

    @property
    def is_alone(self) -> bool:
        """Whether one leaf is all that it returns."""
        return len(self.leaves) == 1 and not self.leaves[0].path

    def build(self, values: Any) -> Any:
        """Return the tree of what a graph returned: a list of all leaves, or the only one."""
        values = [values] if self.is_alone else values
        if self.spec is not None:
            return unflatten(values, self.spec)
        return build({leaf.path: x for leaf, x in zip(self.leaves, values, strict=True)})

    def build_of_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """Return the tree of the tensors among its leaves."""
        waiting = iter(tensors)
        values = [x.value if x.shape is None else next(waiting) for x in self.leaves]
        return self.build(values[0] if self.is_alone else values)


def named_tensors(output: Any) -> dict[str, Tensor]:
    """Return the tensors of what a model returned, by name, in order."""
    found = leaves(output)
    return {Output(path, ()).name: x for path, x in found if isinstance(x, Tensor)}


def find_prediction(output: Any, name: str | None = None) -> Tensor:
    """Return the tensor of what a model returned that is its prediction.

    Args:
        output: A tensor, which is it whatever the name, or a tree.
        name: Its name; None means ``logits``, or the first tensor where none is called so.

    Raises:
        GraphError: If there is no such tensor.
    """
    if isinstance(output, Tensor):
        return output
    found = named_tensors(output)
    place = next(iter(found), None) if name is None and LOGITS not in found else name or LOGITS
    if place is None or place not in found:
        raise GraphError(
            f"expected an output '{place or LOGITS}' of the model, got {', '.join(found) or 'none'}"
            ": name one of them by prediction=NAME."
        )
    return found[place]


def choose_prediction(
    modes: Mapping[str, Outputs], wanted: str | int | None, classes: int
) -> str | None:
    """Return the name of the output that is the prediction; None where there is only one.

    Args:
        modes: What the model returns, by mode.
        wanted: Name of an output, or place in a tuple; None means the only tensor, else the one
            called ``logits``, else the first of shape ``(N, classes)``.
        classes: Of the data.

    Raises:
        ConfigError: If there is none, or it has another shape in one of the modes.
    """
    found = {mode: _choose(outputs, wanted, classes) for mode, outputs in modes.items()}
    names = {name for name in found.values() if name is not None}
    if len(names) > 1:
        raise ConfigError(
            f"expected logits under one name in both modes of the model, got {found}: return them "
            "under one name."
        )
    return next(iter(names), None)


def _choose(outputs: Outputs, wanted: str | int | None, classes: int) -> str | None:
    tensors = outputs.tensors
    fitting = [x.name for x in tensors if _fits(x, classes)]
    if outputs.is_alone or (wanted is None and len(tensors) == 1):
        is_named = wanted is None or str(wanted) in ("0", ONE_OUTPUT, LOGITS)
        if not tensors or not _may_predict(tensors[0], classes) or not is_named:
            raise _refused(outputs, None if wanted is None else str(wanted), classes)
        return None if outputs.is_alone else tensors[0].name
    if wanted is None:
        best = [name for name in fitting if name == LOGITS] or fitting
        if not best:
            raise _refused(outputs, None, classes)
        return best[0]
    names = {str(wanted), f"{ONE_OUTPUT}.{wanted}"}
    named = [x.name for x in tensors if x.name in names and _may_predict(x, classes)]
    if not named or (fitting and named[0] not in fitting):
        raise _refused(outputs, str(wanted), classes)
    return named[0]


def _may_predict(x: Output, classes: int) -> bool:
    """Whether labels could be compared with it: a model may have more outputs than classes."""
    return x.is_real and x.shape is not None and len(x.shape) > 1 and x.shape[-1] >= classes


def _fits(x: Output, classes: int) -> bool:
    return _may_predict(x, classes) and x.shape is not None and x.shape[-1] == classes


def _refused(outputs: Outputs, wanted: str | None, classes: int) -> ConfigError:
    shown = ", ".join(x.shown for x in outputs.tensors) or "no tensor"
    asked = "" if wanted is None else f" with prediction={wanted}"
    return ConfigError(
        f"expected logits of shape (N, {classes}) or (N, T, {classes}) among the outputs of the "
        f"model{asked}, got {shown}: name them by prediction=NAME, or give the model "
        f"{classes} classes."
    )


def describe_leaf(path: Path, values: tuple[Any, Any]) -> Output:
    """Return one leaf of what a model returns.

    Args:
        path: The way to it.
        values: What it is for the example, and for a batch of one more.
    """
    first, more = values
    if not isinstance(first, Tensor):
        return Output(path, None, value=first)
    has_batch = first.ndim > 0 and first.shape[:1] != more.shape[:1]
    return Output(path, tuple(first.shape), has_batch, first.is_floating_point())
