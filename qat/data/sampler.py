"""The order of samples: a function of seed and epoch, cut into global batches, dealt to ranks."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from qat.data.source import Pair, generator
from qat.errors import DataError


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class EpochBatchSampler(Sampler[list[Pair]]):
    """Yields lists of ``(epoch, index)``; rank r of w gets places r, r+w, ... of each global batch.

    A last batch that does not divide over the ranks is filled up with its own first samples, so on
    a single process every sample comes exactly once.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per step over all ranks together.
        seed: Seed of the order.
        shuffle: Whether each epoch has its own order; otherwise 0, 1, 2, ...
        drop_last: Whether an incomplete last batch is left out.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0
        self.ahead = 0

    @property
    def sampler(self) -> "EpochBatchSampler":
        """This object: Lightning calls ``batch_sampler.sampler.set_epoch`` before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; ``ahead`` is what the caller counts too many."""
        self.epoch = epoch - self.ahead

    def order(self, epoch: int) -> Tensor:
        """Return the order of all samples in an epoch, shape (num_samples,)."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=generator("order", self.seed, epoch))

    def __len__(self) -> int:
        if self.drop_last:
            return self.num_samples // self.batch_size
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[list[Pair]]:
        """Yield this rank's share of each global batch of ``epoch``, from batch ``start`` on."""
        rank, world = rank_and_world()
        if self.batch_size % world:
            raise DataError(
                f"expected a global batch size that the {world} processes can share evenly, but "
                f"data.batch_size is {self.batch_size}; choose a multiple of {world}."
            )
        epoch, order = self.epoch, self.order(self.epoch).tolist()
        for batch in range(self.start, len(self)):
            share = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            size = math.ceil(len(share) / world) * world
            share = (share * world)[:size]
            yield [(epoch, index) for index in share[rank::world]]
