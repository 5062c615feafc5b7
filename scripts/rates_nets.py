"""Float networks of other habits than the recipes', trained briefly from seeds, and their data.

Each is what somebody else may bring to ``recipe=resnet_w4a4 ckpt=...``: weights of another
optimizer, biases in front of batch-norms, inputs of another scale. One thread and one seed make the
same weights again on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2, mobilenet_v2

from qat.models.cifar_resnet import CifarResNet, resnet20 as cifar_resnet20

BATCH = 128
PADDING = 4


class Block(nn.Module):
    """Two 3x3 convolutions with biases; where the shape changes, a 1x1 one in the shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        changes = stride != 1
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet8(num_classes: int = 10) -> nn.Sequential:
    """Make a ResNet-8 like that of MLPerf Tiny (Banbury et al., arXiv:2106.07597)."""
    blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
    stem = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)
    return nn.Sequential(*stem, *blocks, *head)


def resnet20(num_classes: int = 10) -> CifarResNet:
    """Make the ResNet-20 of the checkpoint that is given."""
    return cifar_resnet20(num_classes)


def mobilenet(num_classes: int = 10) -> MobileNetV2:
    """Make torchvision's MobileNetV2 of half the width."""
    return mobilenet_v2(num_classes=num_classes, width_mult=0.5)


@dataclass(frozen=True)
class Net:
    """A network, its inputs and how it is trained.

    Args:
        make: Makes it.
        mean: Subtracted from pixels in 0 to 1.
        std: Divides them then; 1/255 leaves pixels from 0 to 255.
        steps: Of float training on all training images, in batches of 128.
        quantized_epochs: Of the run that is given the checkpoint, on a part of them.
        quantized_batch: Samples of a batch there.
        rate: Highest rate of Adam's cycle.
        half: Whether to compute in bfloat16: faster but for depthwise convolutions.
        start: Name of the file of weights to start from; ``None``: seeded ones.
    """

    make: Callable[[], nn.Module]
    mean: float
    std: float
    steps: int
    quantized_epochs: int
    quantized_batch: int
    rate: float
    half: bool
    start: str | None = None


NETS = {
    "resnet8": Net(resnet8, 0.0, 1 / 255, 2340, 8, 128, 4e-3, True),
    "resnet20": Net(resnet20, 0.5, 0.5, 300, 1, 64, 5e-4, True, "resnet20-12fca82f.th"),
    "mobilenet": Net(mobilenet, 0.5, 0.25, 1500, 1, 64, 6e-3, False),
}


def read_images(path: Path) -> dict[str, np.ndarray]:
    """Return ``x_train``, ``y_train``, ``x_test`` and ``y_test``; images are (N, H, W, C) bytes."""
    with np.load(path) as file:
        return {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}


def write_subset(images: dict[str, np.ndarray], path: Path, train: int, test: int) -> None:
    """Write the first ``train`` and ``test`` samples for ``data=arrays``."""
    np.savez(
        path,
        x_train=images["x_train"][:train],
        y_train=images["y_train"][:train],
        x_test=images["x_test"][:test],
        y_test=images["y_test"][:test],
    )


def train_float(net: Net, images: dict[str, np.ndarray], seed: int, folder: Path) -> nn.Module:
    """Return ``net`` trained with Adam over one cycle of the rate, on shifted, mirrored images.

    Args:
        net: What to train.
        images: What ``read_images`` returned.
        seed: Of weights, order and augmentation.
        folder: Where files of start weights are.
    """
    torch.manual_seed(seed)
    model = net.make()
    if net.start is not None:
        _load(model, folder / net.start)
    model = model.to(memory_format=torch.channels_last)
    x = torch.from_numpy(images["x_train"]).permute(0, 3, 1, 2)
    padded, y = F.pad(x, [PADDING] * 4), torch.from_numpy(images["y_train"]).long()
    optimizer = torch.optim.Adam(model.parameters(), net.rate, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, net.rate, net.steps)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(net.steps):
        order = order if len(order) >= BATCH else torch.randperm(len(y))
        chosen, order = order[:BATCH], order[BATCH:]
        batch = normalise(_crops(padded, chosen, x.shape[-1]), net)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=net.half):
            logits = model.train()(batch)
        F.cross_entropy(logits.float(), y[chosen]).backward()
        optimizer.step()
        cycle.step()
    return model.eval()


def _load(model: nn.Module, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})


def _crops(padded: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Return images cut out at random places, half of them mirrored."""
    images = padded[chosen]
    rows, columns = torch.randint(2 * PADDING + 1, (2, len(chosen), 1)) + torch.arange(size)
    columns = torch.where(torch.rand(len(chosen), 1) < 0.5, columns, columns.flip(1))
    each = torch.arange(len(chosen))[:, None, None]
    return images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def normalise(images: Tensor, net: Net) -> Tensor:
    """Return bytes as the network reads them."""
    return (images.float() / 255 - net.mean) / net.std


@torch.no_grad()
def accuracy(model: nn.Module, net: Net, images: dict[str, np.ndarray]) -> float:
    """Return the accuracy on all test images, percent."""
    x = torch.from_numpy(images["x_test"]).permute(0, 3, 1, 2)
    right = [model(normalise(part, net)).argmax(1) for part in x.split(500)]
    return float((torch.cat(right) == torch.from_numpy(images["y_test"])).float().mean() * 100)
