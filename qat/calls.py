"""One call of a model: what comes by position and what comes by name, tensors in any tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.trees import flatten, unflatten


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
        args: What comes by position.
        kwargs: What comes by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(batch: Any) -> Call:
        """Return the call for a batch: a mapping by name, a tuple by position, else one argument.

        A model whose one argument is a mapping or a tuple takes ``(argument,)``.
        """
        if isinstance(batch, Call):
            return batch
        if isinstance(batch, Mapping):
            return Call((), dict(batch))
        return Call(batch if isinstance(batch, tuple) else (batch,), {})

    def on(self, model: Callable[..., Any]) -> Any:
        """Return what ``model`` makes of it."""
        return model(*self.args, **self.kwargs)

    def on_copies(self, model: Callable[..., Any]) -> Any:
        """Return what ``model`` makes of copies of the tensors, as a model may write into them."""
        return self.map(Tensor.clone).on(model)

    def map(self, change: Callable[[Tensor], Any]) -> Call:
        """Return the same call of changed tensors."""
        values, spec = flatten((self.args, self.kwargs))
        changed = [change(x) if isinstance(x, Tensor) else x for x in values]
        return Call(*unflatten(changed, spec))

    def to(self, device: torch.device | str) -> Call:
        """Return the same call with its tensors on ``device``."""
        return self.map(lambda x: x.to(device))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, those by position first."""
        return [x for x in flatten((self.args, self.kwargs))[0] if isinstance(x, Tensor)]

    @property
    def lengths(self) -> list[int]:
        """Lengths of axis 0 of its tensors, the commonest first, of equals the first one first."""
        return [
            length for length, _ in Counter(len(x) for x in self.tensors if x.ndim).most_common()
        ]

    @property
    def samples(self) -> int:
        """How many samples it has: the length that most of its tensors have; 0 without one."""
        return next(iter(self.lengths), 0)

    def take(self, count: int) -> Call:
        """Return the call for the first samples: tensors of another length have no batch."""
        samples = self.samples
        return self.map(lambda x: x[:count] if x.ndim > 0 and len(x) == samples else x)


def on_device(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with its tensors on ``device``."""
    return (batch if isinstance(batch, Tensor) else Call.of(batch)).to(device)


def on_batch(model: Callable[..., Any], batch: Any) -> Any:
    """Return what ``model`` makes of a batch: a tensor, or arguments by position or by name."""
    return Call.of(batch).on(model)
