"""The contract of all data modules; a data set only has to implement :meth:`DataModule.load`."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.calls import on_device
from qat.data.arguments import check_device, check_number, check_whole
from qat.data.loaded import Loaded, check_usable
from qat.data.loader import ResumableLoader, SourceLoader
from qat.data.sampler import EpochBatchSampler
from qat.data.source import Batch, Source, View, generator
from qat.data.tensors import TensorSource
from qat.errors import ConfigError

MONITOR_SAMPLES = 2000
MOST_WORKERS = 256


class Loading(TypedDict, total=False):
    """Arguments that every data module passes on to :class:`DataModule`."""

    batch_size: int
    val_fraction: float
    num_workers: int
    seed: int
    device: str | None


class DataModule(pl.LightningDataModule):
    """Loaders for training, validation, test and calibration.

    After :meth:`setup` it has ``num_classes``, ``class_names``, ``input_shape`` (of one sample,
    without the batch) and ``mean`` and ``std`` (None where nothing is normalised). Batches are
    ``(x, y)``: normalised float32, or int64 tokens, and int64. Nothing is ever chosen on the test
    set.

    Args:
        batch_size: Samples per training step over all ranks together.
        val_fraction: Share of the training set that is held out for validation. With 0 all of it is
            trained on, and validation looks at a fixed 2,000 training samples without augmentation.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of the split, the order and the augmentation.
        device: Where training samples are held and augmented, such as ``"cuda"``: for sets in
            memory, without workers. None leaves them in main memory.

    Raises:
        ConfigError: If an argument is out of range, or contradicts another one.
    """

    num_classes: int
    class_names: list[str]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_whole("batch_size", batch_size, 1)
        check_number("val_fraction", val_fraction, 0, 1)
        check_whole("num_workers", num_workers, 0, MOST_WORKERS)
        check_device(device)
        if device is not None and num_workers:
            raise ConfigError(
                f"expected data.num_workers=0 with data.device={device}, got {num_workers}: nobody "
                "reads ahead what is on the device; set it to 0."
            )
        self.device = device
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.seed = seed
        self._train: View | None = None

    @abstractmethod
    def load(self) -> Loaded:
        """Read and check the data set.

        Raises:
            DataError: If it is missing or malformed.
        """

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 (one split serves all stages)
        """Load the data set and split it; a second call does nothing.

        Args:
            stage: Ignored.

        Raises:
            DataError: If the data set is missing, malformed or too small or large to train on.
        """
        if self._train is not None:
            return
        loaded = self.load()
        check_usable(loaded, self.batch_size)
        loaded = self._place(loaded)
        self.class_names, self.num_classes = loaded.class_names, len(loaded.class_names)
        self.input_shape = loaded.train.input_shape
        self.mean, self.std = loaded.mean, loaded.std
        kept, held_out = self._split(len(loaded.train))
        self._val = View(loaded.train.plain(), held_out)
        self._test = loaded.test
        self._train = View(loaded.train, kept)

    def _place(self, loaded: Loaded) -> Loaded:
        if self.device is None:
            return loaded
        if not isinstance(loaded.train, TensorSource):
            raise ConfigError(
                f"expected data.device=null for a data set that is read from files, got "
                f"{self.device}: remove it."
            )
        return replace(loaded, train=loaded.train.to(self.device))

    def _split(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Return the indices to train on and to validate on, both in ascending order."""
        order = torch.randperm(num_samples, generator=generator("split", self.seed))
        if self.val_fraction == 0:
            return torch.arange(num_samples), order[:MONITOR_SAMPLES].sort().values
        num_val = min(max(1, round(num_samples * self.val_fraction)), num_samples - 1)
        return order[num_val:].sort().values, order[:num_val].sort().values

    def _train_view(self) -> View:
        self.setup()
        assert self._train is not None
        return self._train

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled, augmented training batches; an incomplete last one is dropped."""
        train = self._train_view()
        drop_last = len(train) >= self.batch_size
        order = EpochBatchSampler(len(train), self.batch_size, self.seed, drop_last=drop_last)
        return ResumableLoader(train, order, self.num_workers)

    def val_dataloader(self) -> SourceLoader:
        """Return every validation sample once, in a fixed order, without augmentation."""
        self.setup()
        return self._in_order(self._val)

    def test_dataloader(self) -> SourceLoader:
        """Return every test sample once, in a fixed order, without augmentation."""
        self.setup()
        return self._in_order(self._test)

    def _in_order(self, source: Source) -> SourceLoader:
        order = EpochBatchSampler(len(source), self.batch_size, self.seed, shuffle=False)
        return SourceLoader(source, order, self.num_workers)

    @property
    def is_random(self) -> bool:
        """Whether training inputs differ from epoch to epoch: augmentation, or moving windows."""
        return self._train_view().is_random

    def training_inputs(self) -> Iterator[Any]:
        """Read every training input as the first epoch has it, in the data set's order.

        Yields:
            Batches of (batch_size, *input_shape), all of them on every rank; the last is filled up
            with the first samples. A training set smaller than one batch comes as a single batch.
        """
        train = self._train_view()
        size = min(self.batch_size, len(train))
        for start in range(0, len(train), size):
            places = [(0, i % len(train)) for i in range(start, start + size)]
            yield train.__getitems__(places)[0]

    def calibration_batches(self, num: int) -> list[Any]:
        """Read training inputs without augmentation, the same on every rank and in every epoch.

        Args:
            num: Number of batches; fewer come where the training set has not as many full ones.

        Returns:
            Normalised inputs, float32, or tokens, int64, each of shape (batch_size, *input_shape),
            in a shuffled order of their own; a training set smaller than one batch comes as a
            single batch. Several inputs come as calls.

        Raises:
            ConfigError: If ``num`` is below 1.
        """
        return [x for x, _ in self.labelled_batches(num)]

    def labelled_batches(
        self, num: int, *, most: int | None = None, augmented: bool = False
    ) -> list[Batch]:
        """Read training samples as ``calibration_batches`` does, with their labels.

        Args:
            num: Number of batches.
            most: Most samples of a batch; ``None`` for those of a training step.
            augmented: Whether inputs are as the first epoch has them, with augmentation.

        Raises:
            ConfigError: If ``num`` is below 1.
        """
        if num < 1:
            raise ConfigError(
                f"expected at least 1 calibration batch, got {num}; raise the number."
            )
        train = self._train_view() if augmented else self._train_view().plain()
        order = torch.randperm(len(train), generator=generator("calibration", self.seed)).tolist()
        size = min(most or self.batch_size, self.batch_size, len(train))
        starts = range(0, min(num, len(train) // size) * size, size)
        batches = [train.__getitems__([(0, i) for i in order[s : s + size]]) for s in starts]
        return [(on_device(x, "cpu"), y.cpu()) for x, y in batches]
