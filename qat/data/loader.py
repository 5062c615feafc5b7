"""A loader that a killed run resumes in the middle of an epoch.

Lightning saves the ``state_dict`` of every loader that has one, and gives it back before the first
batch of a resumed run. It asks for the iterator *before* it announces the epoch, so everything here
waits for the first ``next``; and since our loaders have a length, its fetcher does not prefetch:
batches delivered are batches trained on, whatever the worker processes have read ahead.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from qat.data.sampler import EpochBatchSampler
from qat.data.source import Batch, Source
from qat.data.workers import (
    FEWER,
    PREFETCH,
    NoRoom,
    ReadAhead,
    check_shared,
    death,
    own_child_signals,
)
from qat.errors import DataError, QatError

log = logging.getLogger("qat")


def as_is(batch: Any) -> Any:
    """Collate nothing: a source returns whole batches."""
    return batch


class SourceLoader(DataLoader[Batch]):
    """Reads a source in the order of a batch sampler, leaving torch's global generator untouched.

    Args:
        source: The data set.
        sampler: The order.
        num_workers: Processes that read ahead; 0 reads in this process.
    """

    def __init__(self, source: Source, sampler: EpochBatchSampler, num_workers: int = 0) -> None:
        self.order, self.source = sampler, source
        self._has_warned = False
        super().__init__(
            ReadAhead(source) if num_workers else source,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=as_is,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH if num_workers else None,
            pin_memory=torch.cuda.is_available() and not source.is_on_device,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the batches.

        Raises:
            DataError: If workers cannot be started, or one dies.
            QatError: What a data set raises in a worker.
        """
        batches = self._batches()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if (ours := self._explained(error)) is None:
                    raise
                raise ours from error
            if isinstance(batch, QatError):
                raise batch
            yield self._read(batch) if isinstance(batch, NoRoom) else batch

    def _read(self, batch: NoRoom) -> Batch:
        """Read a batch here: the same numbers, from the same source."""
        if not self._has_warned:
            log.warning("%s", batch)
        self._has_warned = True
        return self.source.__getitems__(batch.pairs)

    def _batches(self) -> Iterator[Any]:
        with own_child_signals():
            batches = super().__iter__()
        yield from batches

    def _explained(self, error: Exception) -> DataError | None:
        """Return an error of the loader itself as ours, where workers are the reason."""
        if not self.num_workers:
            return None
        reading: Any = self._iterator
        if reading is None:
            return DataError(
                f"expected to start {self.num_workers} worker processes, got "
                f"{type(error).__name__} ({error}): {FEWER}."
            )
        if (died := death(reading._workers)) is not None:
            reading._shutdown_workers()
            self._iterator = None  # another iteration starts new ones
        return died


class ResumableLoader(SourceLoader):
    """A training loader whose state is the epoch and the number of batches delivered in it.

    Args:
        source: The data set.
        sampler: The order.
        num_workers: Processes that read ahead; 0 reads in this process.

    Raises:
        DataError: If what the workers read ahead does not fit into shared memory.
    """

    def __init__(self, source: Source, sampler: EpochBatchSampler, num_workers: int = 0) -> None:
        check_shared(source, sampler.batch_size, len(sampler), num_workers)
        super().__init__(source, sampler, num_workers)
        self._epoch = 0
        self._delivered = 0
        self._resuming = False

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the sampler's epoch; after a resume, those not delivered yet."""
        self._begin()
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def _begin(self) -> None:
        """Decide which epoch this iteration is, and where in it to begin.

        Under ``max_steps``, Lightning 2.6 counts an epoch twice when it resumes from the end of
        one; what it announces from then on is ahead of the truth.
        """
        order = self.order
        goes_on = self._resuming and order.epoch == self._epoch
        if self._resuming and not goes_on:
            too_many = max(0, order.epoch - (self._epoch + 1))
            order.ahead += too_many
            order.epoch -= too_many
        self._resuming = False
        self._epoch = order.epoch
        self._delivered = self._delivered if goes_on else 0
        order.start = self._delivered

    def _layout(self) -> dict[str, int]:
        """What has to be the same for a position to mean the same samples."""
        order = self.order
        return {
            "num_samples": order.num_samples,
            "batch_size": order.batch_size,
            "seed": order.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data: epoch, batches delivered, and the layout they count in."""
        place = {"epoch": self._epoch, "delivered": self._delivered, "ahead": self.order.ahead}
        return {**place, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved place.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            DataError: If the data set, the global batch size or the seed has changed.
        """
        for key, now in self._layout().items():
            if state_dict[key] != now:
                raise DataError(
                    f"expected to resume with {key} {state_dict[key]} of the checkpoint, but the "
                    f"training data has {key} {now}; resume with the settings of the first run."
                )
        self._epoch, self._delivered = state_dict["epoch"], state_dict["delivered"]
        self.order.epoch, self.order.ahead = state_dict["epoch"], state_dict["ahead"]
        self._resuming = True
