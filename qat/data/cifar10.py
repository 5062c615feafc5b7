"""CIFAR-10 as torchvision downloads it.

Source:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torchvision.datasets import CIFAR10

from qat.data.arrays import PADDING
from qat.data.augment import CropFlip, check_augment
from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import IMAGENET_MEAN, IMAGENET_STD
from qat.data.tensors import TensorSource
from qat.errors import DataError


class Cifar10Data(DataModule):
    """50,000 training and 10,000 test images, downloaded once (170 MB) into ``root``.

    Args:
        root: Folder of the download.
        mean: Subtracted per channel; that of ImageNet, as in the usual public checkpoints.
        std: Divides per channel.
        augment: "crop_flip" (shift by up to 4 pixels, mirror), "crop" or "none".
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If ``augment`` is unknown.
    """

    def __init__(
        self,
        root: str | Path = "data",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augment: str = "crop_flip",
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(**loading)
        check_augment(augment)
        self.root = Path(root)
        self.augment = augment
        self._statistics = tuple(mean), tuple(std)

    def prepare_data(self) -> None:
        """Download the data set if it is not there yet.

        Raises:
            DataError: If the download fails.
        """
        self._read(train=True)

    def load(self) -> Loaded:
        """Read both parts.

        Raises:
            DataError: If the data set cannot be had.
        """
        mean, std = self._statistics
        train, test = self._read(train=True), self._read(train=False)
        x, x_test = (torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test))
        augment = None
        if self.augment != "none":
            augment = CropFlip(len(x), PADDING, self.augment == "crop_flip", self.seed)
        source = TensorSource(x.contiguous(), torch.tensor(train.targets), mean, std, augment)
        held = TensorSource(x_test.contiguous(), torch.tensor(test.targets), mean, std)
        return Loaded(source, held, list(train.classes), mean, std)

    def _read(self, train: bool) -> CIFAR10:
        try:
            return CIFAR10(str(self.root), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"expected CIFAR-10 in {self.root.resolve()} or a network to download it, got "
                f"{type(error).__name__} ({error}); connect, copy cifar-10-batches-py there, or "
                f"use data=arrays with an .npz file."
            ) from error
