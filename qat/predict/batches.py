"""Batches of inputs, read ahead by worker processes.

A batch is a range of input numbers, whatever in it can be read: so batches are the same for any
number of workers and wherever one begins, and with them every bit of the predictions.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.loader import as_is
from qat.errors import DataError
from qat.predict.inputs import Inputs

FEW_IMAGES = 256  # starting processes takes longer than decoding these
MOST_WORKERS = 8


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


class Batches(Dataset[Batch]):
    """The batches of all inputs, by number.

    Args:
        inputs: What they are made of, in order.
        size: Inputs in each, less in the last.
    """

    def __init__(self, inputs: Inputs, size: int) -> None:
        self.inputs, self.size = inputs, size

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.size)

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
        # One tensor, not one for each sample: between processes each takes a file descriptor.
        return Batch(names, torch.stack(samples) if samples else torch.empty(0), left_out)


def read_batches(batches: Batches, workers: int | None = None, start: int = 0) -> Iterator[Batch]:
    """Yield batches in order, from number ``start`` on.

    Args:
        batches: All of them.
        workers: Processes that read ahead; 0 reads in this one, None chooses.
        start: Number of the first one to read.

    Raises:
        DataError: If a worker process dies.
    """
    wanted = choose_workers(batches.inputs.images) if workers is None else workers
    order = range(start, len(batches))
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=min(wanted, len(order)),
        collate_fn=as_is,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    try:
        yield from iterate(loader)
    except (RuntimeError, OSError, EOFError) as error:  # the last two where a pipe breaks first
        if not loader.num_workers:
            raise
        raise DataError(
            f"expected {loader.num_workers} worker processes to read the inputs, but one failed "
            f"({error}): give them more memory, or lower --workers or --batch."
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
