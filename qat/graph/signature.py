"""How a model is called: which tensors stand where among its arguments and its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from qat.errors import GraphError


@dataclass(frozen=True)
class Example:
    """One call of a model.

    Attributes:
        args: What comes by position.
        kwargs: What comes by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(batch: Any) -> Example:
        """Return the call for a batch: a dict by name, a tuple by position, else one argument."""
        if isinstance(batch, Example):
            return batch
        if isinstance(batch, dict):
            return Example((), dict(batch))
        return Example(batch if isinstance(batch, tuple) else (batch,), {})

    def call(self, model: Any) -> Any:
        """Return what ``model`` makes of copies of the tensors, as a model may write into them."""
        leaves, tree = tree_flatten((self.args, self.kwargs))
        copies = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(copies, tree)
        return model(*args, **kwargs)


class Signature:
    """The calling convention of one model, fixed by an example.

    Args:
        model: The model.
        example: One call of it, with a batch on axis 0 of its first tensor.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.names = _positional_names(model, len(example.args))
        self.example = example
        leaves, self.tree = tree_flatten(self._by_name(example.args, example.kwargs))
        self.leaves = leaves
        first = next((x for x in leaves if isinstance(x, Tensor)), None)
        if first is None or first.ndim == 0:
            raise GraphError(
                "expected an example with a tensor that has a batch axis, got "
                f"{type(first).__name__}: pass a batch as the model takes it."
            )
        self.batch = len(first)

    def _by_name(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        order = [*self.names, *sorted(kwargs.keys() - set(self.names))]
        return {name: given[name] for name in order if name in given}

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Return name and example of every tensor argument, in order."""
        named = tree_flatten_with_path(self._by_name(self.example.args, self.example.kwargs))[0]
        return [(_name(path), x) for path, x in named if isinstance(x, Tensor)]

    def rebuild(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments with ``tensors`` in place of the example's, by position and by name."""
        waiting = iter(tensors)
        leaves = [next(waiting) if isinstance(x, Tensor) else x for x in self.leaves]
        given = tree_unflatten(leaves, self.tree)
        by_position = [given.pop(name) for name in self.names[: len(self.example.args)]]
        return by_position, given

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors of a call, in the order of ``tensors``.

        Raises:
            GraphError: If the call has another form than the example.
        """
        if len(args) == 1 and not kwargs and len(self.leaves) == 1 and isinstance(args[0], Tensor):
            return [args[0]]
        leaves, tree = tree_flatten(self._by_name(args, kwargs))
        if tree != self.tree:
            raise GraphError(
                f"expected a call like the captured one, {self.tree}, got {tree}: pass the same "
                "arguments, or capture the model again with an example of this form."
            )
        return [x for x in leaves if isinstance(x, Tensor)]

    @staticmethod
    def flatten_output(result: Any) -> tuple[Any, TreeSpec]:
        """Return the leaves of what a model returned, alone if it is only one, and their tree."""
        leaves, tree = tree_flatten(result)
        return (leaves[0] if tree.is_leaf() else leaves), tree


def unflatten_output(leaves: Any, tree: TreeSpec) -> Any:
    """Undo ``Signature.flatten_output``."""
    return leaves if tree.is_leaf() else tree_unflatten(leaves, tree)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(type(model).forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names) + 1)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[1:]  # without self


def _name(path: Any) -> str:
    text = keystr(path)
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
    return "_".join(words)
