"""Batches of inputs, read ahead by worker processes.

A batch is a range of input numbers, whatever in it can be read: so batches are the same for any
number of workers and wherever one begins, and with them every bit of the predictions. They come
from workers through pipes, not through shared memory, of which containers often have 64 MB.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.loader import as_is
from qat.errors import ConfigError, DataError
from qat.predict.inputs import Inputs

log = logging.getLogger("qat")
FEW_IMAGES = 256  # starting processes takes longer than decoding these
MOST_WORKERS = 8
"""That are started unasked."""
MOST_ASKED = 256
MOST_BYTES = 4 << 30
"""Of the samples of a batch."""


@dataclass(frozen=True)
class Batch:
    """Samples with their names, and what was left out with its reason.

    Attributes:
        names: One for each sample.
        samples: Normalised, float32, shape (N, ...); N may be 0.
        left_out: Name and reason of each input that cannot be read.
    """

    names: list[str]
    samples: Tensor
    left_out: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.names) + len(self.left_out)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle samples as bytes: a tensor would go through shared memory."""
        return _from_numpy, (self.names, self.samples.numpy(), self.left_out)


def _from_numpy(names: list[str], samples: np.ndarray, left_out: list[tuple[str, str]]) -> Batch:
    return Batch(names, torch.from_numpy(samples), left_out)


class Batches(Dataset[Batch]):
    """The batches of all inputs, by number.

    Args:
        inputs: What they are made of, in order.
        size: Inputs in each, less in the last.
    """

    def __init__(self, inputs: Inputs, size: int) -> None:
        self.inputs, self.size = inputs, size

    def __len__(self) -> int:
        return (len(self.inputs) + self.size - 1) // self.size

    def __getitem__(self, number: int) -> Batch:
        """Read one batch."""
        first = number * self.size
        names, samples, left_out = [], [], []
        for i in range(first, min(first + self.size, len(self.inputs))):
            name = self.inputs.name(i)
            try:
                samples.append(self.inputs.read(i))
                names.append(name)
            except DataError as error:
                left_out.append((name, str(error)))
        return Batch(names, torch.stack(samples) if samples else torch.empty(0), left_out)


def check_batch(size: int, workers: int | None, inputs: Inputs) -> None:
    """Check that memory can hold a batch, and that workers are no more than a machine can start.

    Args:
        size: Inputs of a batch.
        workers: Processes that are asked for.
        inputs: What batches are made of.

    Raises:
        ConfigError: If they are too many.
    """
    if workers is not None and workers > MOST_ASKED:
        raise ConfigError(f"expected --workers from 0 to {MOST_ASKED}, got {workers}: lower it.")
    needed = min(size, len(inputs)) * math.prod(inputs.reader.shape) * 4
    if needed > MOST_BYTES:
        raise ConfigError(
            f"expected a batch of at most {MOST_BYTES >> 30} GiB, got --batch {size}, which is "
            f"{needed / (1 << 30):.1f} GiB of samples: lower it."
        )


def read_batches(batches: Batches, workers: int | None = None, start: int = 0) -> Iterator[Batch]:
    """Yield batches in order, from number ``start`` on.

    Args:
        batches: All of them.
        workers: Processes that read ahead; 0 reads in this one, None chooses.
        start: Number of the first one to read.

    Raises:
        DataError: If worker processes cannot be started, or one dies.
    """
    wanted = choose_workers(batches.inputs.images) if workers is None else workers
    order = range(start, len(batches))
    count = min(wanted, len(order))
    if not count or not _can_start(count):
        yield from map(batches.__getitem__, order)
        return
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=count,
        collate_fn=as_is,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    stream = _start(loader)
    while (batch := _next(stream, count)) is not None:
        yield batch


def _can_start(count: int) -> bool:
    """Return whether the system has locks for so many workers, and say so if not.

    They lie in shared memory; without, torch would fail half-way and complain about itself.
    """
    try:
        _ = [multiprocessing.Lock() for _ in range(8 + 4 * count)]
    except OSError as error:
        log.warning("inputs are read without worker processes, which need /dev/shm: %s", error)
        return False
    return True


def _start(loader: DataLoader[Batch]) -> Iterator[Batch]:
    try:
        return iterate(loader)
    except OSError as error:  # no shared memory for a lock, no process, no file descriptor
        raise DataError(
            f"expected to start {loader.num_workers} worker processes to read the inputs, got "
            f"{error}: lower --workers; with --workers 0 there are none."
        ) from error


def _next(stream: Iterator[Batch], count: int) -> Batch | None:
    try:
        return next(stream, None)
    except (RuntimeError, OSError, EOFError) as error:  # the last two where a pipe breaks first
        raise DataError(
            f"expected {count} worker processes to read the inputs, but one failed ({error}): give "
            "them more memory, or lower --workers or --batch."
        ) from error


def iterate(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Return an iterator that raises only where a batch is waited for.

    torch would also raise at the signal of a dying worker, wherever the main thread happens to be.
    Without that signal it looks for dead workers every five seconds of waiting.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        of_torch = getattr(before, "__module__", "").startswith("torch.")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if of_torch or before is None else before)
    return batches


def choose_workers(images: int) -> int:
    """Return how many processes shall decode: a core each but for one, none for few images."""
    if images < FEW_IMAGES:
        return 0
    return max(0, min((os.cpu_count() or 1) - 1, MOST_WORKERS))


def end_with_parent(_worker: int) -> None:
    """Let this worker process end when its parent does, even if that is killed.

    A worker of torch looks for its parent too, but then waits for somebody to read its last batch.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers come here"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
