"""CIFAR-10 as torchvision downloads it.

Source:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from qat.data.arguments import check_text, statistic
from qat.data.arrays import PADDING
from qat.data.augment import CropFlip, check_augment
from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import IMAGENET_MEAN, IMAGENET_STD
from qat.data.tensors import TensorSource
from qat.errors import DataError, printable
from qat.files import kind

CHANNELS = 3
FILES = dict([*CIFAR10.train_list, *CIFAR10.test_list])


class Cifar10Data(DataModule):
    """50,000 training and 10,000 test images, downloaded once (170 MB) into ``root``.

    Args:
        root: Folder of the download.
        mean: Subtracted per channel; None means that of ImageNet, as in the usual public
            checkpoints.
        std: Divides per channel, with the same default.
        augment: "crop_flip" (shift by up to 4 pixels, mirror), "crop" or "none".
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If ``augment`` is unknown, or ``mean`` or ``std`` are not three numbers.
    """

    def __init__(
        self,
        root: str | Path = "data",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str = "crop_flip",
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(**loading)
        check_augment(augment)
        check_text("root", root)
        self.root = Path(root)
        self.augment = augment
        self._mean = statistic("mean", mean, CHANNELS) or IMAGENET_MEAN
        self._std = statistic("std", std, CHANNELS) or IMAGENET_STD

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
        mean, std = self._mean, self._std
        train, test = self._read(train=True), self._read(train=False)
        x, x_test = (torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test))
        augment = None
        if self.augment != "none":
            augment = CropFlip(len(x), PADDING, self.augment == "crop_flip", self.seed)
        source = TensorSource(x.contiguous(), torch.tensor(train.targets), mean, std, augment)
        held = TensorSource(x_test.contiguous(), torch.tensor(test.targets), mean, std)
        return Loaded(source, held, list(train.classes), mean, std)

    def _read(self, train: bool) -> CIFAR10:
        """Read one part; torchvision unpickles a file only if it has the checksum of the original.

        Raises:
            DataError: If it is not there and cannot be downloaded.
        """
        self._refuse_special_files()
        try:
            return CIFAR10(str(self.root), train=train, download=True)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            wrong = [n for n, md5 in FILES.items() if not check_integrity(self._path(n), md5)]
            raise DataError(
                f"expected CIFAR-10 in {printable(self.root)} or a network to download it, got "
                f"{len(wrong)} of {len(FILES)} files missing or damaged ({', '.join(wrong)}) and "
                f"{type(error).__name__} ({printable(error)}); connect, copy cifar-10-batches-py "
                f"there, or use data=arrays with an .npz file."
            ) from error

    def _path(self, name: str) -> Path:
        return self.root / CIFAR10.base_folder / name

    def _refuse_special_files(self) -> None:
        for path in (self.root / CIFAR10.filename, *map(self._path, FILES)):
            if (what := kind(path)) not in ("a file", "nothing"):
                raise DataError(
                    f"expected a file of CIFAR-10 or nothing at {printable(path)}, got: {what}; "
                    "remove it or correct data.root."
                )
