"""The smallest model: one matrix, for tabular data and for tests."""

from collections import OrderedDict

from torch import nn


def linear(in_features: int, num_classes: int) -> nn.Sequential:
    """Make a linear classifier that flattens its input.

    Args:
        in_features: Numbers per sample, over all dimensions.
        num_classes: Classes.
    """
    layers = {"flatten": nn.Flatten(), "linear": nn.Linear(in_features, num_classes)}
    return nn.Sequential(OrderedDict(layers))
