"""Convolutions that training computes in their own ways: the first, and those of large weights."""

from __future__ import annotations

from torch import Tensor, fx, nn

from qat.fake_quant import FakeQuant
from qat.functional.convolution import LARGE, Convolution, convolve_large, is_large
from qat.functional.first_conv import first_conv, suits
from qat.graph.chains import is_looked_at
from qat.layers import QuantizedLayer


class LargeLayer:
    """A convolution whose weight is large.

    Args:
        layer: The convolution.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer, self.modules = layer, list[nn.Module]([layer])
        self.convolution = _ways(layer)
        self.__name__ = self.__qualname__ = "large_layer"  # generated code calls it by name

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the convolution makes of ``x``; its gradients come one after the other."""
        layer = self.layer
        if is_looked_at(self.modules):
            return layer(x)
        weight = layer.weight
        if not is_large(x, weight):
            return layer._conv_forward(x, weight, layer.bias)
        return convolve_large(x, weight, layer.bias, self.convolution)


class FirstLayer:
    """A fake-quant of the network's input, and the convolution that alone reads it.

    Args:
        fake_quant: What puts the input on its grid.
        layer: The convolution.
    """

    def __init__(self, fake_quant: FakeQuant, layer: nn.Conv2d) -> None:
        self.fake_quant, self.layer = fake_quant, layer
        self.modules = [fake_quant, layer]
        self.convolution = _ways(layer)
        self.__name__ = self.__qualname__ = "first_layer"  # generated code calls it by name

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the convolution makes of ``x`` on its grid; as one where that is possible."""
        if not is_looked_at(self.modules) and self.fake_quant.only_snaps:
            grid, layer = self.fake_quant.quantizer.grid_of(x), self.layer
            if grid is not None and suits(x, grid):
                return first_conv(x, layer.weight, layer.bias, grid, self.convolution)
        return self.layer(self.fake_quant(x))


def _ways(layer: nn.Conv2d) -> Convolution:
    ways = (layer.stride, layer.padding, layer.dilation)
    stride, padding, dilation = (list(map(int, way)) for way in ways)
    return Convolution(stride, padding, dilation, layer.groups)


def find_large_layer(node: fx.Node, modules: dict[str, nn.Module]) -> LargeLayer | None:
    """Return the layer that ``node`` calls, if it is a convolution with a large weight."""
    layer = _plain_convolution(node, modules)
    if layer is None or layer._parameters["weight"].numel() < LARGE:  # pyright: ignore[reportOptionalMemberAccess]
        return None
    return LargeLayer(layer)


def find_first_layer(
    node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[FirstLayer, fx.Node] | None:
    """Return the first layer that ``node`` calls and the network's input, if it is one."""
    layer = _plain_convolution(node, modules)
    if layer is None or layer.groups != 1:
        return None
    source = node.all_input_nodes[0]
    fake_quant = modules.get(str(source.target))
    if not isinstance(fake_quant, FakeQuant):
        return None
    (x,) = source.all_input_nodes
    others = [user for user in source.users if user is not node]
    if x.op != "placeholder" or any(user.target != "size" for user in others):
        return None
    for user in others:
        user.replace_input_with(source, x)  # it has the same size
    return FirstLayer(fake_quant, layer), x


def _plain_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Conv2d | None:
    """Return the layer that ``node`` calls, if it computes a convolution and nothing else."""
    layer = modules[str(node.target)] if node.op == "call_module" else None
    if not isinstance(layer, nn.Conv2d) or not isinstance(layer, QuantizedLayer):
        return None
    own = super(QuantizedLayer, type(layer)).forward  # of the class that was quantized
    known = own is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
    padded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return layer if known and padded and not layer.links.inner else None
