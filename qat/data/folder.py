"""A folder of images, one sub-folder per class, as for ImageNet."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import IMAGENET_MEAN, IMAGENET_STD, Batch, Pair, Source, derive_seed
from qat.errors import ConfigError, DataError

CROP_RATIO = 0.875  # The usual evaluation crop: 224 of 256 pixels.


class ImageSource(Source):
    """Image files, decoded when they are read.

    Args:
        samples: File and class of each image.
        size: Height and width after cropping, in pixels.
        seed: Seed of random crops and flips; None means the centre crop.
    """

    def __init__(self, samples: list[tuple[str, int]], size: int, seed: int | None) -> None:
        self.samples = samples
        self.size = size
        self.seed = seed
        self.transform = transform(size, random=seed is not None)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, pair: Pair) -> tuple[Tensor, int]:
        """Read one image.

        Args:
            pair: Epoch and index.

        Returns:
            Normalised image, float32, shape (3, size, size), and class.

        Raises:
            DataError: If the file is not a readable image.
        """
        epoch, index = pair
        path, label = self.samples[index]
        image = read_image(path)
        if self.seed is None:
            return self.transform(image), label
        # Only the CPU generator, which the transforms draw from: a GPU's would not be restored.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("image", self.seed, epoch, index))
            return self.transform(image), label

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read one batch."""
        x, y = default_collate([self[pair] for pair in pairs])
        return x, y

    def plain(self) -> "ImageSource":
        """Return the same images, cropped at the centre."""
        return ImageSource(self.samples, self.size, seed=None)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return (3, self.size, self.size)

    @property
    def is_random(self) -> bool:
        """Whether a sample's inputs differ from epoch to epoch."""
        return self.seed is not None


class FolderData(DataModule):
    """``root/train/<class>/*.jpg`` to train on and ``root/val`` (or ``root/test``) as the test set.

    Args:
        root: The folder.
        size: Height and width after cropping, in pixels.
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If ``size`` is below 1.
    """

    def __init__(self, root: str | Path, size: int = 224, **loading: Unpack[Loading]) -> None:
        super().__init__(**loading)
        if size < 1:
            raise ConfigError(f"expected data.size to be at least 1 pixel, got {size}; raise it.")
        self.root = Path(root)
        self.size = size

    def load(self) -> Loaded:
        """List the files of both parts.

        Raises:
            DataError: If a folder is missing or empty, or the classes of the two parts differ.
        """
        test_folder = self.root / "val"
        if not test_folder.is_dir() and (self.root / "test").is_dir():
            test_folder = self.root / "test"
        train, test = list_folder(self.root / "train"), list_folder(test_folder)
        if train.classes != test.classes:
            differing = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(
                f"expected the same classes in {self.root / 'train'} and {test_folder}, but "
                f"{', '.join(differing[:5])} ({len(differing)} in all) are only in one of them; "
                f"make the sub-folders match."
            )
        source = ImageSource(train.samples, self.size, self.seed)
        held = ImageSource(test.samples, self.size, seed=None)
        return Loaded(source, held, train.classes, IMAGENET_MEAN, IMAGENET_STD)


def transform(size: int, random: bool) -> Callable[[Image.Image], Any]:
    """Make the ImageNet preparation of an image: a random crop and flip, or the centre crop.

    Args:
        size: Height and width after cropping, in pixels.
        random: Which of the two.
    """
    if random:
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(round(size / CROP_RATIO)), transforms.CenterCrop(size)]
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return transforms.Compose([*crop, transforms.ToTensor(), normalize])


def list_folder(folder: Path) -> ImageFolder:
    """List the classes and files of a folder.

    Args:
        folder: A folder with one sub-folder of images for each class.

    Raises:
        DataError: If there is no such folder, no class in it, or a class without images.
    """
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"expected {folder} to hold one sub-folder of images for each class, but it does not "
            f"({error}); correct data.root or fill the folder."
        ) from error


def read_image(path: str) -> Image.Image:
    """Decode an image file as RGB.

    Args:
        path: The file.

    Raises:
        DataError: If it is missing or not a readable image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"expected a readable image at {path}, but it cannot be decoded ({error}); repair or "
            f"delete the file."
        ) from error
