"""Run an exported file in onnxruntime, like a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from qat.calls import Call
from qat.errors import ExportError, reason
from qat.export.file_call import FileCall
from qat.export.form import CALL
from qat.export.onnx_file import decode_metadata, read_onnx, refused
from qat.export.sums import cuts_off_sums
from qat.functional.affine import full_precision
from qat.signature import Signature

CPU = "CPUExecutionProvider"
_EXACT_4_BIT = "session.qdq_matmulnbits_accuracy_level"
"""Unless it is 1, products with 4-bit blocks also quantize what they multiply, to 8 bits."""
_EXACT_SUMS = "session.x64quantprecision"
"""1 moves weights to uint8, whose sums are exact without VNNI; with it that only costs speed."""
_SPINNING = "session.intra_op.allow_spinning"
_SHARED = "replace the existing tensor"
log = logging.getLogger("qat")


class OnnxModel:
    """An ``.onnx`` file loaded in onnxruntime; call it like the model that it was made of.

    It returns the tensor of a file with one output, else dictionaries and tuples like the model.

    Args:
        path: The file.
        optimise: Whether onnxruntime may fuse and rewrite the graph.
        outputs: More tensors of the graph to return, by name.
        providers: Execution providers, the preferred one first.
        threads: Threads that one operation may use; None lets onnxruntime choose.
        spinning: Whether they wait for the next call at work: quick answers, and a core each.

    Attributes:
        call: Arguments to its inputs, its outputs to what the model returns.

    Raises:
        ExportError: If the file is missing or damaged, onnxruntime refuses it or has no such
            provider.
    """

    package = "onnxruntime"
    suffix = ".onnx"

    def __init__(
        self,
        path: str | Path,
        *,
        optimise: bool = True,
        outputs: Sequence[str] = (),
        providers: Sequence[str] = (CPU,),
        threads: int | None = None,
        spinning: bool = True,
    ) -> None:
        self.path = path = Path(path)
        content = read_onnx(path)[0]
        _check_providers(providers)
        try:
            content = _with_outputs(content, outputs)
            tries = (True, False) if cuts_off_sums() else (False,)
            options = [_options(optimise, threads, exact_sums=exact) for exact in tries]
            for each in options:
                each.add_session_config_entry(_SPINNING, str(int(spinning)))
            self.session = _open(content, options, providers)
            self.outputs = [x.name for x in self.session.get_outputs()]
            own = self.outputs[: len(self.outputs) - len(outputs)]
            stored = self.session.get_modelmeta().custom_metadata_map
            self.call = FileCall([x.name for x in self.session.get_inputs()], own, stored)
        except Exception as error:
            raise refused(path, "onnxruntime", reason(error)) from error

    def run(self, batch: Any) -> dict[str, np.ndarray]:
        """Return output name to array for one batch.

        Args:
            batch: A tensor ``(N, ...)``, real values or integers, or a tuple or mapping of
                arguments.

        Raises:
            ExportError: If the graph cannot run on it.
            GraphError: If the model took other arguments.
        """
        feeds = self.call.feeds(Call.of(batch))
        try:
            feeds = {name: full_precision(x) for name, x in feeds.items()}
            values = self.session.run(self.outputs, {k: x.numpy() for k, x in feeds.items()})
        except Exception as error:  # onnxruntime's own classes, and what a graph makes of shapes
            shapes = ", ".join(str(tuple(x.shape)) for x in feeds.values())
            raise ExportError(
                f"expected a graph in '{self.path}' that runs on inputs of shape {shapes}, "
                f"got {reason(error)}: give it inputs as it was exported for, or export it again."
            ) from error
        return dict(zip(self.outputs, map(np.asarray, values), strict=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of a file that has one, else all of them, for one call."""
        found = self.run(Call(args, kwargs))
        return self.call.build([torch.from_numpy(found[name]) for name in self.call.outputs])

    @property
    def signature(self) -> Signature | None:
        """How it is called; None of a file that does not say: tensors in a row."""
        return self.call.signature

    @property
    def metadata(self) -> dict[str, Any]:
        """What the exporter stored: class names, normalisation, scheme, versions.

        Raises:
            ExportError: If another program wrote the file, in a form of its own.
        """
        facts = decode_metadata(self.session.get_modelmeta().custom_metadata_map)
        return {key: value for key, value in facts.items() if key != CALL}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the first input, without the batch axis."""
        return tuple(self.session.get_inputs()[0].shape[1:])

    @property
    def prediction_shape(self) -> tuple[Any, ...]:
        """Shape of the prediction; axes of any length have names."""
        return tuple(self.session.get_outputs()[self.call.prediction].shape)


def _options(optimise: bool, threads: int | None, *, exact_sums: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it would log it raises
    options.add_session_config_entry(_EXACT_4_BIT, "1")
    options.add_session_config_entry(_EXACT_SUMS, str(int(exact_sums)))
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or 0
    return options


def _open(content: Any, options: Sequence[Any], providers: Sequence[str]) -> Any:
    """Open a session with the first options that can run the file.

    Without VNNI onnxruntime 1.32 fails to add up exactly where two layers have one weight.
    """
    try:
        return onnxruntime.InferenceSession(content, options[0], providers=[*providers])
    except Exception as error:
        if len(options) == 1 or _SHARED not in str(error):
            raise
        log.warning("sums may be cut off: this processor has no VNNI, and layers share weights")
        return _open(content, options[1:], providers)


def _check_providers(wanted: Sequence[str]) -> None:
    """Raise for a provider that is not here: onnxruntime would quietly use the CPU instead."""
    here = onnxruntime.get_available_providers()
    missing = [name for name in wanted if name not in here]
    if missing:
        raise ExportError(
            f"expected execution providers that onnxruntime has here ({', '.join(here)}), got "
            f"{', '.join(missing)}: choose another, or install the onnxruntime that brings it."
        )


def _with_outputs(content: bytes, outputs: Sequence[str]) -> bytes:
    """Return a file whose graph has more outputs."""
    if not outputs:
        return content
    proto = onnx.load_model_from_string(content)
    for name in outputs:
        proto.graph.output.add().name = name
    return proto.SerializeToString()
