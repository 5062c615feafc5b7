"""Sites of a converted model and the tensors of codes that an exported file names after them."""

from __future__ import annotations

from pathlib import Path

from torch import fx, nn

from qat.codecs import ActivationCodec, DynamicTensorCodec
from qat.errors import ExportError
from qat.export.onnx_file import read_onnx

SUFFIX = ":codes"
_CODECS = (ActivationCodec, DynamicTensorCodec)


def call_order(model: fx.GraphModule) -> list[str]:
    """Return the site of every quantize in the order of execution; repeats are numbered."""
    return [site for sites in _calls(model).values() for site in sites]


def sources(model: fx.GraphModule, site: str) -> list[str]:
    """Return the sites whose codes the operations in front of ``site`` read."""
    calls = _calls(model)
    (node,) = [n for n, sites in calls.items() if site in sites]
    found, waiting, seen = [], list(node.all_input_nodes), set[fx.Node]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if calls[source]:
            found += calls[source]
        else:
            waiting += source.all_input_nodes
    return [s for s in call_order(model) if s in found]


def check_sites(path: Path, model: fx.GraphModule) -> list[str]:
    """Return the sites of a file, which are those of ``model``.

    Args:
        path: An exported file.
        model: The converted model that it is said to hold.

    Raises:
        ExportError: If the file cannot be read, or has other sites.
    """
    proto = read_onnx(path)[1]
    names = [name for node in proto.graph.node for name in node.output]
    found = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
    expected = call_order(model)
    different = sorted(set(found) ^ set(expected))
    if different:
        raise ExportError(
            f"expected the quantized sites of this model in '{path}', got {len(different)} that "
            f"only one of the two has, first '{different[0]}': export the model again."
        )
    return expected


def _calls(model: fx.GraphModule) -> dict[fx.Node, list[str]]:
    calls: dict[fx.Node, list[str]] = {}
    count: dict[str, int] = {}
    for node in model.graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else nn.Module()
        calls[node] = []
        for codec in (m for m in module.modules() if isinstance(m, _CODECS)):
            count[codec.site] = repeat = count.get(codec.site, 0) + 1
            calls[node].append(codec.site if repeat == 1 else f"{codec.site}#{repeat}")
    return calls
