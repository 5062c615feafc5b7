"""Real handwritten digits that come with scikit-learn: no download, seconds to train.

Source:
    UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), the 1,797 images of
    its test part, 8x8 pixels of 17 grey levels.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.data.arguments import check_whole, statistic
from qat.data.augment import CropFlip, check_augment
from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import generator
from qat.data.tensors import TensorSource
from qat.errors import DataError
from qat.memory import check_fits

NUM_IMAGES = 1797
NUM_TEST = 500
COPIES = 3  # enlarged, repeated, split
WHITE = 16
# Measured over the pixels of the 1,297 training images, scaled to 0..1.
MEAN = 0.3056
STD = 0.3765


class DigitsData(DataModule):
    """1,297 training and 500 test images; the split is fixed and does not depend on the seed.

    Args:
        size: Height and width in pixels; other sizes than 8 are interpolated. None means 8.
        channels: How often the grey channel is repeated; 3 fits any vision model.
        augment: "crop" (shift by up to an eighth of the size), "crop_flip" or "none".
        mean: Subtracted per channel from pixels in 0..1; None means that of the training images.
        std: Divides per channel, with the same default.
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        size: int | None = None,
        channels: int = 3,
        augment: str = "crop",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(**loading)
        check_augment(augment)
        self.size = 8 if size is None else size
        check_whole("size", self.size, 1)
        check_whole("channels", channels, 1)
        self.channels = channels
        self.augment = augment
        self._mean = statistic("mean", mean, channels)
        self._std = statistic("std", std, channels)

    def load(self) -> Loaded:
        """Read, scale, enlarge and split the images.

        Raises:
            DataError: If images of that size do not fit into memory.
        """
        num_bytes = COPIES * NUM_IMAGES * self.channels * self.size**2 * 4
        check_fits(
            num_bytes,
            f"{NUM_IMAGES} digits of {self.channels} x {self.size} x {self.size} pixels",
            "lower data.size or data.channels",
            DataError,
        )
        x, y = read_digits(self.size, self.channels)
        order = torch.randperm(len(y), generator=generator("digits"))
        test, train = order[:NUM_TEST], order[NUM_TEST:]
        mean = self._mean or (MEAN,) * self.channels
        std = self._std or (STD,) * self.channels
        augment = None
        if self.augment != "none":
            padding = max(1, self.size // 8)
            augment = CropFlip(len(train), padding, self.augment == "crop_flip", self.seed)
        return Loaded(
            TensorSource(x[train], y[train], mean, std, augment),
            TensorSource(x[test], y[test], mean, std),
            [str(digit) for digit in range(10)],
            mean,
            std,
        )


def read_digits(size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return all 1,797 images, float32 in 0..1, shape (N, channels, size, size), and their labels.

    Args:
        size: Height and width in pixels; enlarged bilinearly where it is not 8.
        channels: How often the grey channel is repeated.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / WHITE
    if size != 8:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return x.repeat(1, channels, 1, 1), torch.from_numpy(labels).long()
