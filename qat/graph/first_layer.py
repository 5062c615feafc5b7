"""The convolution that reads the network's input, joined with the fake-quant of that input."""

from __future__ import annotations

from torch import Tensor, fx, nn

from qat.fake_quant import FakeQuant
from qat.functional.first_conv import Convolution, first_conv, suits
from qat.graph.chains import is_looked_at
from qat.layers import QuantizedLayer


class FirstLayer:
    """A fake-quant of the network's input, and the convolution that alone reads it.

    Args:
        fake_quant: What puts the input on its grid.
        layer: The convolution.
    """

    def __init__(self, fake_quant: FakeQuant, layer: nn.Conv2d) -> None:
        self.fake_quant, self.layer = fake_quant, layer
        self.modules = [fake_quant, layer]
        ways = (layer.stride, layer.padding, layer.dilation)
        self.convolution = Convolution(*(list(map(int, way)) for way in ways))
        self.__name__ = self.__qualname__ = "first_layer"  # generated code calls it by name

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the convolution makes of ``x`` on its grid; as one where that is possible."""
        if not is_looked_at(self.modules) and self.fake_quant.only_snaps:
            grid, layer = self.fake_quant.quantizer.grid_of(x), self.layer
            if grid is not None and suits(x, grid):
                return first_conv(x, layer.weight, layer.bias, grid, self.convolution)
        return self.layer(self.fake_quant(x))


def find_first_layer(
    node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[FirstLayer, fx.Node] | None:
    """Return the first layer that ``node`` calls and the network's input, if it is one."""
    layer = modules[str(node.target)] if node.op == "call_module" else None
    if not isinstance(layer, nn.Conv2d) or not _is_plain(layer):
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


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether a layer computes what a convolution without groups does, and nothing else."""
    if not isinstance(layer, QuantizedLayer) or layer.links.inner:
        return False
    own = super(QuantizedLayer, type(layer)).forward  # of the class that was quantized
    known = own is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
    padded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return known and padded and layer.groups == 1
