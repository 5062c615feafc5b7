"""How a model is called: which tensors stand where among its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.calls import Call
from qat.errors import GraphError
from qat.outputs import Outputs
from qat.trees import Path, flatten, leaves, name_of, unflatten

ONE_INPUT = "input"
"""What files call the input of a model that takes one tensor by position."""


@dataclass(frozen=True)
class Input:
    """A tensor among the arguments of a model.

    Attributes:
        path: Its parameter, and the way from there.
        shape: In the example.
        dtype: Of its values.
        has_batch: Whether axis 0 counts samples.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_batch: bool

    @property
    def name(self) -> str:
        """The parameter's name, and the way from there: ``pair.0``."""
        return name_of(self.path)

    @property
    def shown(self) -> str:
        """Name and shape, for messages."""
        sizes = ["N", *self.shape[1:]] if self.has_batch else self.shape
        return f"{self.name} ({', '.join(map(str, sizes))})"


class Signature:
    """The calling convention of one model, by position or by name; an argument of None is absent.

    Args:
        parameters: Names of the parameters that may come by position, in order.
        inputs: The tensors, in the order of the graphs' placeholders.
        constants: Values of all other leaves; they cannot change.

    Attributes:
        prediction: Name of the output that is the prediction; None where there is only one, or
            nobody has chosen yet.
    """

    prediction: str | None = None

    @property
    def samples(self) -> int:
        """Samples of the example; 1 where it has no batch."""
        return next((x.shape[0] for x in self.inputs if x.has_batch), 1)

    def __init__(
        self, parameters: Sequence[str], inputs: Iterable[Input], constants: Mapping[Path, Any]
    ) -> None:
        self.parameters, self.inputs = tuple(parameters), tuple(inputs)
        self.constants = dict(constants)

    @staticmethod
    def of(model: nn.Module, example: Call, samples: int | None = None) -> Signature:
        """Return the calling convention that an example fixes.

        Args:
            model: The model.
            example: One call of it, with a batch on axis 0.
            samples: How many samples it has: tensors of that length have a batch; None means
                the length that most tensors have.

        Raises:
            GraphError: If no tensor has an axis.
        """
        if example.samples == 0:
            raise GraphError(
                "expected an example with a tensor that has a batch axis, got "
                f"{', '.join(tuple_of(x) for x in example.tensors) or 'no tensor'}: pass a batch "
                "as the model takes it."
            )
        samples = example.samples if samples is None else samples
        parameters = _positional_names(model, len(example.args))
        found = Signature(parameters, (), {}).by_path(example)
        inputs = [
            Input(path, tuple(x.shape), x.dtype, x.ndim > 0 and len(x) == samples)
            for path, x in found.items()
            if isinstance(x, Tensor)
        ]
        constants = {path: x for path, x in found.items() if not isinstance(x, Tensor)}
        return Signature(parameters, inputs, constants)

    def without_batch(self) -> Signature:
        """Return the same for a graph that runs on the example's number of samples alone."""
        fixed = [replace(x, has_batch=False) for x in self.inputs]
        return Signature(self.parameters, fixed, self.constants)

    @property
    def is_plain(self) -> bool:
        """Whether the model takes one tensor by position and nothing else."""
        first = self.parameters[:1]
        return len(self.inputs) == 1 and not self.constants and self.inputs[0].path == first

    def by_path(self, call: Call) -> dict[Path, Any]:
        """Return the leaves of a call that are not None, by path."""
        given = {**dict(zip(self.parameters, call.args, strict=False)), **call.kwargs}
        order = [*self.parameters, *sorted(call.kwargs.keys() - set(self.parameters))]
        named = {name: given[name] for name in order if name in given}
        return {path: x for path, x in leaves(named) if x is not None}

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a call in the order of ``inputs``.

        Args:
            args: By position; or one batch alone, a tuple or mapping of arguments.
            kwargs: By name.

        Raises:
            GraphError: If the call has another form than the example.
        """
        if self.is_plain and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [args[0]]
        call = Call(tuple(args), dict(kwargs))
        if not self._takes(call) and len(args) == 1 and isinstance(args[0], tuple | Mapping):
            batch = Call.of(args[0])
            call = batch if not kwargs and self._takes(batch) else call
        if not self._takes(call):
            raise GraphError(
                f"expected a call like the captured one, {self.shown}, got {self._shown(call)}: "
                "pass the same arguments, or capture the model again with an example of this form."
            )
        found = self.by_path(call)
        return [found[x.path] for x in self.inputs]

    def _takes(self, call: Call) -> bool:
        found = self.by_path(call)
        rest = {path: x for path, x in found.items() if not isinstance(x, Tensor)}
        wanted = {x.path for x in self.inputs}
        fits = len(call.args) <= len(self.parameters) and found.keys() - rest.keys() == wanted
        return fits and rest == self.constants

    @property
    def shown(self) -> str:
        """The arguments, for messages."""
        plain = [f"{name_of(path)}={value!r:.40}" for path, value in self.constants.items()]
        return ", ".join([*(x.shown for x in self.inputs), *plain])

    def _shown(self, call: Call) -> str:
        extra = [f"an argument number {len(self.parameters) + 1}"]
        found = [
            f"{name_of(path)} {tuple_of(x)}" if isinstance(x, Tensor) else f"{name_of(path)}={x!r}"
            for path, x in self.by_path(call).items()
        ]
        return ", ".join([*found, *(extra if len(call.args) > len(self.parameters) else [])])

    def fill(self, call: Call, tensors: Sequence[Any]) -> Call:
        """Return ``call`` with ``tensors``, in the order of ``inputs``, in place of its own."""
        waiting = {x.path: tensor for x, tensor in zip(self.inputs, tensors, strict=True)}
        args = tuple(
            _replaced((name,), value, waiting)
            for name, value in zip(self.parameters, call.args, strict=False)
        )
        kwargs = {name: _replaced((name,), value, waiting) for name, value in call.kwargs.items()}
        return Call(args, kwargs)

    def take(self, batch: Any, count: int) -> Call:
        """Return the call for the first ``count`` samples of a batch."""
        return self.pick(batch, slice(count))

    def pick(self, batch: Any, samples: slice) -> Call:
        """Return the call for some samples of a batch."""
        call = Call.of(batch)
        tensors = self.flatten(call.args, call.kwargs)
        taken = [
            x[samples] if input.has_batch else x
            for input, x in zip(self.inputs, tensors, strict=True)
        ]
        return self.fill(call, taken)


def _replaced(path: Path, value: Any, tensors: Mapping[Path, Any]) -> Any:
    values, spec = flatten(value)
    paths = [(*path, *rest) for rest, _ in leaves(value)]
    return unflatten([tensors.get(p, v) for p, v in zip(paths, values, strict=True)], spec)


def tuple_of(x: Tensor) -> str:
    """Return the shape of a tensor, for messages."""
    return str(tuple(x.shape))


def _positional_names(model: nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(type(model).forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names) + 1)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[1:]  # without self


def interface(model: nn.Module) -> tuple[Signature | None, Outputs | None]:
    """Return how a model of integers is called, and what it returns.

    None where it was made of a bare graph: that takes and returns tensors in a row.
    """
    known: Mapping[str, Any] = getattr(model, "meta", {})
    return known.get("signature"), known.get("outputs")
