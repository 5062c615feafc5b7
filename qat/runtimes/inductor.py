"""Run a packed file in PyTorch, compiled: Inductor's int8 kernels for x86 processors.

torchao brings the patterns that turn quantize, layer and dequantize into one oneDNN kernel; without
them Inductor would compile the same graph in float and say nothing. The kernels round where
onnxruntime's do, but with a float factor of their own, so a code at a tie turns now and then.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qat.calls import Call
from qat.errors import ExportError
from qat.export.decomposed import decompose, float_layers
from qat.export.form import tensors_of
from qat.export.packed_graph import to_graph_module
from qat.export.quiet import quiet
from qat.integer_layers import IntegerLayer
from qat.runtimes.packed_model import PackedModel
from qat.signature import interface

log = logging.getLogger("qat")
PATTERNS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
_COUNTS = ("qconv_weight_prepack_matcher_count", "qlinear_weight_prepack_matcher_count")


class InductorModel(PackedModel):
    """A ``.safetensors`` file compiled for the CPU; call it like the model that it was made of.

    The first call with a batch size compiles, which takes seconds to a minute.

    Args:
        path: The file.
        threads: Threads that PyTorch may use from now on in this process; None leaves them.

    Attributes:
        integer_layers: Layers that became int8 kernels; None before the first call.
        shapes: Of the batches that it was compiled for so far.

    Raises:
        ExportError: If torchao is not installed, the processor is not x86, or none of the layers
            has an integer form; says which layer, and why. Also if the file cannot be loaded.
    """

    package = "torchao"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        _check_machine()
        _load_patterns()
        super().__init__(path, threads=threads)
        model, names = to_graph_module(self.packed)
        _check_layers(Path(path), model, names)
        self.compiled = torch.compile(decompose(model), dynamic=False)
        self.integer_layers: int | None = None
        self.shapes: set[tuple[torch.Size, ...]] = set()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for one call, such as logits ``(N, K)``.

        Raises:
            ExportError: If Inductor cannot compile it, such as without a C++ compiler.
            GraphError: If the model took other arguments.
        """
        before = _count_kernels()
        tensors, outputs = tensors_of(self.packed, Call(args, kwargs)), interface(self.packed)[1]
        shapes = tuple(x.shape for x in tensors)
        is_new = shapes not in self.shapes
        try:
            with _compiling() if is_new else nullcontext():
                found = self.compiled(*tensors)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"expected Inductor to compile the model, got {type(error).__name__}: {reason}: "
                "install a C++ compiler, or use another runtime."
            ) from error
        self.shapes.add(shapes)
        if self.integer_layers is None:
            self.integer_layers = _count_kernels() - before
            log.info("inductor runs %d layers in int8 kernels", self.integer_layers)
        return found if outputs is None else outputs.build(found)


def _check_machine() -> None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise ExportError(
            f"expected an x86 processor for Inductor's int8 kernels, got {platform.machine()}: "
            "use onnxruntime or torch."
        )


def _load_patterns() -> None:
    """Import what registers the patterns, and the operators that they match."""
    try:
        with quiet():
            import_module(PATTERNS)
    except ImportError as error:
        raise ExportError(
            f"expected the package torchao for Inductor's int8 kernels, got none ({error}): "
            "install it with pip install 'qat[inductor]'."
        ) from error


def _check_layers(path: Path, model: fx.GraphModule, names: Mapping[str, str]) -> None:
    """Refuse a model of integers without an integer kernel; say which layers stay float."""
    layers = [n for n, m in model.named_modules() if isinstance(m, IntegerLayer)]
    reasons = {names[layer]: reason for layer, reason in float_layers(model).items()}
    if layers and len(reasons) == len(layers):
        site, reason = next(iter(reasons.items()))
        raise ExportError(
            f"expected layers that Inductor has int8 kernels for in '{path}', got {len(layers)} "
            f"that it has none for, first '{site}': {reason}: use 8 bits or fewer, symmetric "
            "weights without group_size, or another runtime."
        )
    for site, reason in reasons.items():
        log.warning("inductor computes '%s' in float: %s", site, reason)


@contextmanager
def _compiling() -> Iterator[None]:
    """Let Inductor take buffers for constants: integer kernels want their weights packed."""
    with import_module("torch._inductor.config").patch(freezing=True), quiet():
        yield


def _count_kernels() -> int:
    counters = import_module("torch._dynamo.utils").counters["inductor"]
    return sum(counters[name] for name in _COUNTS)
