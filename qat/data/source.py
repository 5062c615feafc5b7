"""What a data set is here: something that turns ``(epoch, index)`` pairs into one batch.

The epoch travels with the index, so that augmentation needs no hidden state: worker processes,
ranks, a crash and a resume all see the same sample. Random numbers come from :func:`derive_seed`
alone, never from torch's global generator, which stays free for weights and dropout.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Pair = tuple[int, int]
Batch = tuple[Any, Tensor]
"""Inputs, a tensor or several by the names of the model's parameters; and labels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def derive_seed(*parts: str | int) -> int:
    """Hash a purpose and some numbers into one seed, independent of process and platform.

    Args:
        *parts: What the random numbers are for, e.g. ``"order", seed, epoch``.

    Returns:
        An integer below 2**63.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """Make a random generator seeded by :func:`derive_seed` of ``parts``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


class Source(Dataset[Any], ABC):
    """A labelled data set that is read batch by batch."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read one batch.

        Args:
            pairs: (epoch, index) of each sample.

        Returns:
            Normalised inputs, float32, or tokens, int64, shape (B, *input_shape); and labels,
            int64, shape (B,), or one for each token. Several inputs come by name.
        """

    @abstractmethod
    def plain(self) -> "Source":
        """Return the same samples without augmentation, sharing memory."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """Whether a sample's inputs differ from epoch to epoch."""

    @property
    def is_on_device(self) -> bool:
        """Whether batches come on another device than the CPU."""
        return False


class View(Source):
    """Some samples of a source, in the given order.

    Args:
        source: The whole data set.
        indices: Positions in ``source``, shape (N,).
    """

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices.tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read one batch; indices count within the view."""
        return self.source.__getitems__([(epoch, self.indices[i]) for epoch, i in pairs])

    def plain(self) -> "View":
        """Return the same view of the source without augmentation."""
        return View(self.source.plain(), torch.tensor(self.indices))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return self.source.input_shape

    @property
    def is_random(self) -> bool:
        """Whether a sample's inputs differ from epoch to epoch."""
        return self.source.is_random

    @property
    def is_on_device(self) -> bool:
        """Whether batches come on another device than the CPU."""
        return self.source.is_on_device
