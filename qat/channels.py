"""Where a layer keeps its output channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


def channel_view(layer: nn.Module, values: Tensor) -> Tensor:
    """Shape ``values``, one for each output channel ``(O,)``, so that they go with the weight.

    A grouped transposed convolution keeps its output channels on two axes of the weight.

    Args:
        layer: The layer that the values are for.
        values: Shape ``(O,)``.
    """
    rank = layer._parameters["weight"].ndim  # pyright: ignore[reportOptionalMemberAccess]
    if isinstance(layer, _ConvTransposeNd):
        return values.view(layer.groups, -1, *[1] * (rank - 2))
    axis = channel_axis(layer)
    return values.view(*[1] * axis, -1, *[1] * (rank - 1 - axis))


def channel_axis(layer: nn.Module) -> int:
    """Return the axis on which the weight of ``layer`` keeps its output channels."""
    return 1 if isinstance(layer, _ConvTransposeNd) else getattr(layer, "channel_axis", 0)
