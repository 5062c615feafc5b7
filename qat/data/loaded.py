"""What a data set brings, and whether anything can be learnt from it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qat.data.source import Source
from qat.errors import DataError, printable
from qat.memory import check_fits

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Loaded:
    """What a data set brings: all training samples (augmented), the test set, the classes."""

    train: Source
    test: Source
    class_names: list[str]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def check_usable(loaded: Loaded, batch_size: int) -> None:
    """Refuse a data set that nothing can be learnt from, or of which no batch fits into memory.

    Args:
        loaded: The data set.
        batch_size: Samples of a batch.

    Raises:
        DataError: If there are fewer than two classes or training samples, no test samples, no
            inputs, two classes of one name, or batches larger than memory.
    """
    names, sizes = loaded.class_names, (len(loaded.train), len(loaded.test))
    if len(names) < 2 or sizes[0] < 2 or sizes[1] < 1 or 0 in loaded.train.input_shape:
        raise DataError(
            "expected 2 or more classes, 2 or more training samples, test samples and inputs that "
            f"are not empty, got {len(names)} classes, {sizes[0]} training samples, {sizes[1]} "
            f"test samples and inputs of shape {loaded.train.input_shape}: add what is missing."
        )
    check_names(names)
    num_bytes = min(batch_size, sizes[0]) * math.prod(loaded.train.input_shape) * FLOAT_BYTES
    check_fits(
        num_bytes, "a batch of training samples", "lower data.batch_size or data.size", DataError
    )


def check_names(names: Sequence[str]) -> None:
    """Refuse class names that cannot be told apart or written into a file.

    Raises:
        DataError: If one stands twice, is empty or has characters that do not print.
    """
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(
            f"expected class names that differ, got {printable(twice)!r} twice: rename one."
        )
    for name in names:
        if not name.isprintable() or not name:
            raise DataError(
                f"expected class names of characters that print, got '{printable(name)}': rename "
                "that class."
            )
