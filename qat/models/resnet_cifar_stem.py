"""ResNet-18 of ImageNet for small images: its stem no longer shrinks them by four."""

from torch import nn
from torchvision.models import ResNet, resnet18


def resnet18_cifar(num_classes: int = 10) -> ResNet:
    """Make a ResNet-18 with a 3x3 stem of stride 1 and no max-pooling, for images of about 32x32.

    Args:
        num_classes: Classes.
    """
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model
