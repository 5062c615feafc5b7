"""A trial export: the whole way to both files before training, so that nothing fails behind it.

A copy of the model, with the weights it starts with and calibrated on its example alone, is folded,
converted, exported and loaded, and computes once. Its codes mean nothing; its operations are those
of the artifact. The model itself and the state of random numbers stay as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from qat.errors import ExportError
from qat.export.conversion_error import place
from qat.export.graph_form import UnnamedOperationError, describe_graph
from qat.export.onnx import export_onnx
from qat.export.packed import save_packed
from qat.export.runtime import OnnxModel
from qat.export.storage import Storage
from qat.fake_quant import FakeQuant, Phase, activation_quants, weight_quants
from qat.graph.captured import Captured
from qat.graph.convert import convert
from qat.layers import fold
from qat.observers import MinMax
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel

log = logging.getLogger("qat")


@torch.no_grad()
def try_export(captured: Captured, storage: Storage = "speed") -> float:
    """Export a model that is not trained yet, load both files, and return the seconds it took.

    What the packed file cannot name is a warning, as it is then written without its graph.

    Args:
        captured: The prepared model, in any phase; it is not changed.
        storage: How the ONNX file is stored.

    Raises:
        ExportError: If an operation has no form in ONNX, naming it and the user's line, or the file
            computes outputs of another form.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        model = _convert(captured)
        expected = _outputs(captured, IntegerRun(model))
        _try_onnx(captured, model, Path(folder) / "model.onnx", storage, expected)
        _try_packed(captured, model, Path(folder) / "model.safetensors", expected)
    return time.perf_counter() - start


def _convert(captured: Captured) -> fx.GraphModule:
    copy = deepcopy(captured).cpu().eval()
    for quants in (weight_quants(copy), activation_quants(copy)):
        waiting = [quant for quant in quants if not quant.active]
        _observe(copy, waiting)
    fold(copy)
    return convert(copy)


def _observe(model: Captured, quants: Sequence[FakeQuant]) -> None:
    """Give quantizers the range of the example, or any where that has none."""
    for quant in quants:
        quant.observer = MinMax(quant.observer.spec, tuple(quant.observer.low.shape))
        quant.set_phase(Phase.OBSERVE)
        quant.train()
    _outputs(model, model)
    for quant in quants:
        low, high = quant.observer.range()
        quant.quantizer.set_range(_finite(low, -1.0), _finite(high, 1.0))
        quant.calibrated = True
        quant.set_phase(Phase.QUANTIZE)
        quant.eval()


def _finite(end: Tensor, other: float) -> Tensor:
    return torch.where(end.isfinite(), end, torch.full_like(end, other))


def _outputs(captured: Captured, run: Callable[..., Any]) -> list[Any]:
    return tree_leaves(captured.example.on_copies(run))


def _try_onnx(
    captured: Captured, model: fx.GraphModule, path: Path, storage: Storage, expected: list[Any]
) -> None:
    export_onnx(model, captured.example, path, storage=storage)
    found = _outputs(captured, OnnxModel(path))
    shapes, wanted = ([tuple(y.shape) for y in outputs] for outputs in (found, expected))
    if shapes != wanted:
        raise ExportError(
            f"expected an ONNX file with outputs of shape {wanted}, got {shapes} from its trial "
            "export: report the model, or train with target=simulation, which writes no file."
        )


def _try_packed(captured: Captured, model: fx.GraphModule, path: Path, expected: list[Any]) -> None:
    try:
        describe_graph(model)
    except UnnamedOperationError as error:
        log.warning("model.safetensors will hold no graph (%s): %s", place(error.node), error)
        return
    save_packed(model, captured.example, path, metadata={})
    found = _outputs(captured, PackedModel(path))
    if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        log.warning("trial export: model.safetensors computes other outputs than the model does")
