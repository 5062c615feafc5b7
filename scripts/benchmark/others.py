"""Other tools' quantized training of the same networks: 8-bit weights per channel, activations.

Each function takes a float model and a batch, and returns what is trained and called.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))


def lsq_by_hand(model: nn.Module, x: Tensor) -> nn.Module:
    """LSQ around every layer, as ``scripts/lsq_layers.py`` writes it."""
    import torch
    from lsq_layers import quantize_layers

    quantize_layers(model, 8, 8)
    with torch.no_grad():
        model(x)
    return model


def pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    """Torchao's quantization-aware training of exported programs."""
    from peers import prepare_pt2e

    return prepare_pt2e(model, x, (8, 8), ())


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    """NVIDIA ModelOpt: ranges are calibrated and stay."""
    import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]

    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=lambda m: m(x))


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    """Brevitas: weight scales follow the weights, those of inputs are learned after one step."""
    import torch
    from brevitas.graph.quantize import layerwise_quantize  # pyright: ignore[reportMissingImports]

    del x
    made = layerwise_quantize(model)
    for module in made.modules():
        if hasattr(module, "collect_stats_steps"):
            module.collect_stats_steps = 1
    assert isinstance(made, torch.nn.Module)
    return made


def nncf(model: nn.Module, x: Tensor) -> nn.Module:
    """NNCF: ranges of its post-training quantization, trained further."""
    import nncf as tool  # pyright: ignore[reportMissingImports]

    made = tool.quantize(model.eval(), tool.Dataset([x]), subset_size=1)
    return made.train()


OTHERS = {
    "LSQ by hand": (lsq_by_hand, None),
    "torchao PT2E": (pt2e, "torchao"),
    "ModelOpt": (modelopt, "modelopt"),
    "Brevitas": (brevitas, "brevitas"),
    "NNCF": (nncf, "nncf"),
}
"""By the name of the mode: what prepares a model, and the package that it needs."""


def runs_here(mode: str) -> bool:
    """Return whether what ``mode`` needs is installed."""
    package: Any = OTHERS[mode][1] if mode in OTHERS else None
    return package is None or importlib.util.find_spec(package) is not None
