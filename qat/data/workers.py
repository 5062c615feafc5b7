"""Worker processes that read ahead, and what is said when one fails or shared memory runs out.

PyTorch's loaders lose a batch that does not fit into shared memory: the error stays in a background
thread of the worker, and the training waits for ever. Here a worker moves its batch itself, and
tells the main process to read the batch when it cannot.
"""

import math
import mmap
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import Dataset

from qat.data.source import Batch, Pair, Source
from qat.errors import DataError, QatError, printable
from qat.memory import SHARED, free_shared, shown

PREFETCH = 2  # batches that each worker reads ahead: PyTorch's default
DYING = 5.0  # seconds: a process closes its connections some time before it has an exit status
IN_USE = 3  # batches: of the step, of the one before it, and being handed over
BYTES_OF_INPUT, BYTES_OF_LABEL = 4, 8  # float32 and int64
FEWER = "set data.num_workers=0, lower data.num_workers or lower data.batch_size"
MORE_SHARED = f"start the container with a larger --shm-size, {FEWER}"


@dataclass(frozen=True)
class NoRoom:
    """A batch that does not fit into what is left of shared memory; the main process reads it.

    Attributes:
        pairs: (epoch, index) of each sample.
        num_bytes: Size of the batch.
    """

    pairs: Sequence[Pair]
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"a batch of {shown(self.num_bytes)} found no room in {SHARED}, which has "
            f"{shown(free_shared() or 0)} free; the main process reads such batches, which is "
            f"slower: {MORE_SHARED}"
        )


class ReadAhead(Dataset[Any]):
    """A source as workers read it: batches in shared memory, and errors as values.

    Args:
        source: The data set.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch | QatError | NoRoom:
        """Read one batch; an error carries the worker's traceback as a note."""
        try:
            x, y = self.source.__getitems__(pairs)
        except Exception as error:  # of any data set; sent to where it can be handled
            return _told(error)
        tensors = [*(x.values() if isinstance(x, dict) else [x]), y]
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except RuntimeError:  # no space in /dev/shm
            return NoRoom(pairs, sum(tensor.nbytes for tensor in tensors))
        return x, y


def _told(error: Exception) -> QatError:
    """Return an error that travels: ours as it is, another one as a sentence about the worker."""
    if isinstance(error, QatError):
        told = (type(error) if type(error).__module__ == QatError.__module__ else DataError)(
            str(error)
        )
    elif isinstance(error, MemoryError) or "allocate memory" in str(error):
        told = DataError(
            f"expected memory for a batch in a worker process, got none left: {FEWER}."
        )
    else:
        told = DataError(
            f"expected a batch from a worker process, got {type(error).__name__} "
            f"({printable(error)}): repair what it names, or see the place in the code with "
            "--traceback."
        )
    told.add_note(f"In the worker process:\n{''.join(traceback.format_exception(error))}")
    return told


def check_shared(source: Source, batch_size: int, num_batches: int, num_workers: int) -> None:
    """Refuse workers whose batches do not fit into shared memory.

    Args:
        source: The data set.
        batch_size: Samples of a batch over all ranks together, whose workers share the memory.
        num_batches: Batches of an epoch.
        num_workers: Worker processes of each rank.

    Raises:
        DataError: If the batches read ahead, and the one in use, need more than is free.
    """
    free = free_shared() if num_workers else None
    if free is None:
        return
    size = min(batch_size, len(source))
    inputs = size * math.prod(source.input_shape) * BYTES_OF_INPUT
    batches = min(num_workers * PREFETCH + IN_USE, num_batches)
    if (needed := batches * (_paged(inputs) + _paged(size * BYTES_OF_LABEL))) > free:
        raise DataError(
            f"expected {shown(needed)} free in {SHARED} for data.num_workers={num_workers} "
            f"({batches} batches of {size} samples), got {shown(free)}: {MORE_SHARED}."
        )


def _paged(num_bytes: int) -> int:
    """Return what a tensor takes there: whole pages."""
    return math.ceil(num_bytes / mmap.PAGESIZE) * mmap.PAGESIZE


@contextmanager
def own_child_signals() -> Iterator[None]:
    """Undo what PyTorch does to SIGCHLD when it starts workers.

    Its handler raises wherever the main process happens to be when a worker dies, such as in the
    middle of writing a file. Without it the loader notices when it asks for the next batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def death(workers: Sequence[Any]) -> DataError | None:
    """Return the error for workers of which one has died, or is about to; None if all are alive.

    Args:
        workers: Processes of a loader.
    """
    ended = wait([worker.sentinel for worker in workers], timeout=DYING)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()
    dead = [worker for worker in workers if worker.exitcode]
    if not dead:
        return None
    code = dead[0].exitcode
    how = f"exit status {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    cause = {
        -signal.SIGKILL: f"the system does this when memory runs out, so {FEWER}",
        -getattr(signal, "SIGBUS", 0): f"{SHARED} is full, so {MORE_SHARED}",
    }.get(code, "set data.num_workers=0 to see what happens there")
    return DataError(
        f"expected data.num_workers={len(workers)} to go on reading, got {len(dead)} that died "
        f"(process {dead[0].pid}: {how}): {cause}."
    )
