"""The residual networks for CIFAR-10, with shortcuts that have no parameters.

Names of parameters are those of the usual public checkpoints. ReLUs are modules, one for each
place, so that each can become a site of its own in the graph.

Source:
    He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2, with
    shortcuts of option A.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Takes every second row and column, and adds channels of zeros on both sides.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H/2), ceil(W/2))."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut around them.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut(in_channels, channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of basic blocks (16, 32, 64 channels) and a linear classifier.

    Args:
        num_blocks: Blocks in each stage; the depth is 6 * num_blocks + 2.
        num_classes: Classes.
    """

    def __init__(self, num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(num_blocks, 16, 16, stride=1)
        self.layer2 = _stage(num_blocks, 16, 32, stride=2)
        self.layer3 = _stage(num_blocks, 32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(self.flatten(self.pool(out)))


def _stage(num_blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


def resnet20(num_classes: int = 10) -> CifarResNet:
    """Make the 20-layer network: 0.27 million parameters, 91.25 % in the paper."""
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """Make the 32-layer network: 0.46 million parameters, 92.49 % in the paper."""
    return CifarResNet(5, num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    """Make the 44-layer network: 0.66 million parameters, 92.83 % in the paper."""
    return CifarResNet(7, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """Make the 56-layer network: 0.85 million parameters, 93.03 % in the paper."""
    return CifarResNet(9, num_classes)
