"""Several inputs from one ``.npz`` file: each array ``x_train/NAME`` is an argument."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.data.source import Batch, Pair, Source
from qat.data.tensors import check_finite
from qat.errors import DataError

TRAIN, TEST = "x_train/", "x_test/"


class NamedSource(Source):
    """Inputs by the names of the model's parameters, and labels, in memory.

    Args:
        x: Name to inputs, shape (N, ...): float32, int64 or bool.
        y: Labels, int64, shape (N,).
    """

    def __init__(self, x: Mapping[str, Tensor], y: Tensor) -> None:
        self.x, self.y = dict(x), y

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read one batch."""
        index = torch.tensor([i for _, i in pairs])
        return {name: x[index] for name, x in self.x.items()}, self.y[index]

    def plain(self) -> "NamedSource":
        """Return the same samples: nothing is augmented."""
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """How many numbers a sample has, in all inputs together."""
        return (sum(x[0].numel() for x in self.x.values()),)

    @property
    def is_random(self) -> bool:
        """Whether a sample's inputs differ from epoch to epoch: never."""
        return False


def named_inputs(arrays: Mapping[str, np.ndarray], prefix: str, path: Path) -> dict[str, Tensor]:
    """Return the inputs of one split, by the names behind ``prefix``.

    Args:
        arrays: Of the file, by name.
        prefix: ``x_train/`` or ``x_test/``.
        path: The file, for messages.

    Raises:
        DataError: If one holds no numbers, or values that are not finite.
    """
    found = {name: x for name, x in arrays.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): _input(x, f"{name} of {path}") for name, x in found.items()}


def _input(x: np.ndarray, where: str) -> Tensor:
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}
    if x.dtype.kind not in kinds or x.ndim == 0 or 0 in x.shape:
        raise DataError(
            f"expected {where} to hold floats, whole numbers or booleans (N, ...), but it is "
            f"{x.dtype} of shape {x.shape}; convert it."
        )
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=kinds[x.dtype.kind]))
    check_finite(tensor, where)
    return tensor


def check_alike(train: Mapping[str, Tensor], test: Mapping[str, Tensor], path: Path) -> None:
    """Compare the inputs of both splits.

    Args:
        train: Name to inputs.
        test: Name to inputs.
        path: The file, for messages.

    Raises:
        DataError: If names, types, shapes or numbers of samples differ.
    """
    forms = [{k: (x.dtype, x.shape[1:]) for k, x in part.items()} for part in (train, test)]
    if forms[0] != forms[1]:
        named = [", ".join(f"{k} {x[0]} {tuple(x[1])}" for k, x in f.items()) for f in forms]
        raise DataError(
            f"expected the arrays {TEST}NAME of {path} to be like {TRAIN}NAME, {named[0]}, but "
            f"they are {named[1] or 'none'}; prepare both the same way."
        )
    for part in (train, test):
        if len({len(x) for x in part.values()}) > 1:
            counts = ", ".join(f"{name} {len(x)}" for name, x in part.items())
            raise DataError(
                f"expected as many samples in every input of {path}, but there are {counts}; make "
                "them match."
            )
