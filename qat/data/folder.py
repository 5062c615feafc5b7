"""A folder of images, one sub-folder per class, as for ImageNet."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from qat.data.arguments import check_text, check_whole, statistic
from qat.data.base import DataModule, Loaded, Loading
from qat.data.listing import list_folder
from qat.data.source import IMAGENET_MEAN, IMAGENET_STD, Batch, Pair, Source, derive_seed
from qat.errors import DataError, printable
from qat.files import kind

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What is decoded: for others, such as EPS, Pillow would start another program."""
CROP_RATIO = 0.875  # The usual evaluation crop: 224 of 256 pixels.
CHANNELS = 3
MOST_PIXELS = 100_000_000  # of one image after resizing
MORE_THAN_8_BITS = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class ImageSource(Source):
    """Image files, decoded when they are read.

    Args:
        samples: File and class of each image.
        size: Height and width after cropping, in pixels.
        seed: Seed of random crops and flips; None means the centre crop.
        mean: Subtracted per channel from pixels in 0..1.
        std: Divides per channel.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        size: int,
        seed: int | None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.samples = samples
        self.size = size
        self.seed = seed
        self.statistics = mean, std
        self.transform = transform(size, seed is not None, mean, std)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, pair: Pair) -> tuple[Tensor, int]:
        """Read one image.

        Args:
            pair: Epoch and index.

        Returns:
            Normalised image, float32, shape (3, size, size), and class.

        Raises:
            DataError: If the file is not a readable image, or a narrow one.
        """
        epoch, index = pair
        path, label = self.samples[index]
        image = read_image(path)
        check_ratio(image, self.size, path)
        if self.seed is None:
            return self.transform(image), label
        # Only the CPU generator, which the transforms draw from: a GPU's would not be restored.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("image", self.seed, epoch, index))
            return self.transform(image), label

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read one batch."""
        images, labels = zip(*(self[pair] for pair in pairs), strict=True)
        return torch.stack(images), torch.tensor(labels)

    def plain(self) -> "ImageSource":
        """Return the same images, cropped at the centre."""
        return ImageSource(self.samples, self.size, None, *self.statistics)

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
        mean: Subtracted per channel from pixels in 0..1; None means that of ImageNet.
        std: Divides per channel, with the same default.
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If ``size`` is no whole number of at least 1, ``root`` no text, or ``mean`` or
            ``std`` are not three numbers.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(**loading)
        check_text("root", root)
        check_whole("size", size, 1)
        self.root = Path(root)
        self.size = size
        self._mean = statistic("mean", mean, CHANNELS) or IMAGENET_MEAN
        self._std = statistic("std", std, CHANNELS) or IMAGENET_STD

    def load(self) -> Loaded:
        """List the files of both parts.

        Raises:
            DataError: If a folder is missing or empty, or the classes of the two parts differ.
        """
        test_folder = self.root / "val"
        if kind(test_folder) != "a folder" and kind(self.root / "test") == "a folder":
            test_folder = self.root / "test"
        classes, samples = list_folder(self.root / "train")
        test_classes, test_samples = list_folder(test_folder)
        if classes != test_classes:
            differing = sorted(set(classes) ^ set(test_classes))
            shown = ", ".join(printable(name, 40) for name in differing[:5])
            raise DataError(
                f"expected the same classes in {printable(self.root / 'train')} and "
                f"{printable(test_folder)}, but {shown} ({len(differing)} in all) are only in one "
                f"of them; make the sub-folders match."
            )
        statistics = self._mean, self._std
        source = ImageSource(samples, self.size, self.seed, *statistics)
        held = ImageSource(test_samples, self.size, None, *statistics)
        return Loaded(source, held, classes, *statistics)


def transform(
    size: int,
    random: bool,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Image.Image], Any]:
    """Make the ImageNet preparation of an image: a random crop and flip, or the centre crop.

    Args:
        size: Height and width after cropping, in pixels.
        random: Which of the two.
        mean: Subtracted per channel from pixels in 0..1.
        std: Divides per channel.
    """
    if random:
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(round(size / CROP_RATIO)), transforms.CenterCrop(size)]
    normalize = transforms.Normalize(mean, std)
    return transforms.Compose([*crop, transforms.ToTensor(), normalize])


def read_image(path: str) -> Image.Image:
    """Decode an image file as RGB.

    Args:
        path: The file.

    Raises:
        DataError: If it is missing, not a readable image, too large, or has more than 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices about metadata and large images
            with Image.open(path, formats=FORMATS) as image:
                _check_depth(image, path)
                return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise any kind
        raise DataError(
            f"expected a readable image at {printable(path)}, but it cannot be decoded "
            f"({printable(error) or type(error).__name__}); repair or delete the file."
        ) from error


def _check_depth(image: Image.Image, path: str) -> None:
    if image.mode in MORE_THAN_8_BITS:
        raise DataError(
            f"expected an image of 8 bits a channel at {printable(path)}, got mode {image.mode}, "
            "of which only the darkest values would be kept; convert it."
        )


def check_ratio(image: Image.Image, size: int, path: str) -> None:
    """Refuse an image that would become huge when its short side is resized.

    Args:
        image: The image.
        size: Height and width after cropping, in pixels.
        path: Its file, for the message.

    Raises:
        DataError: If it is so narrow.
    """
    short, long = sorted(image.size)
    if long * (size / CROP_RATIO) ** 2 / short > MOST_PIXELS:
        raise DataError(
            f"expected an image less narrow than {image.width} x {image.height} pixels at "
            f"{printable(path)}: with data.size={size} it would be resized to more than "
            f"{MOST_PIXELS:,} pixels; crop it, delete it or lower data.size."
        )
