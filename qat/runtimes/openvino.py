"""Run an exported file in OpenVINO, like a model.

OpenVINO forms integer convolutions from the same file, but its numbers are its own: it computes a
residual addition inside the convolution in front of it, and there leaves out the rounding to the
convolution's own codes. Elsewhere a code turns now and then where its value lies at a tie.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from qat.calls import Call
from qat.errors import ExportError
from qat.export.file_call import FileCall
from qat.export.form import CALL
from qat.export.onnx_file import decode_metadata, read_onnx, refused
from qat.signature import Signature


class OpenVinoModel:
    """An ``.onnx`` file compiled for the CPU; call it like the model that it was made of.

    What the file leaves in float is computed in float32, also where bfloat16 would be faster.

    Args:
        path: The file.
        threads: Threads that it may use; None lets OpenVINO choose.

    Raises:
        ExportError: If OpenVINO is not installed, the file is missing or OpenVINO refuses it.
    """

    package = "openvino"
    suffix = ".onnx"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        openvino, frontends = _load_package()
        path = Path(path)
        graph = read_onnx(path)[1]
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        try:  # Core.read_model would try every other format too, aloud
            reader = frontends.FrontEndManager().load_by_framework("onnx")
            self.model = reader.convert(reader.load(str(path)))
            self.compiled = openvino.Core().compile_model(self.model, "CPU", options)
            stored = {entry.key: entry.value for entry in graph.metadata_props}
            inputs, outputs = graph.graph.input, graph.graph.output
            self.call = FileCall([x.name for x in inputs], [x.name for x in outputs], stored)
        except Exception as error:
            raise refused(path, "OpenVINO", str(error).strip().splitlines()[-1]) from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of a file that has one, else all of them, for one call."""
        feeds = self.call.feeds(Call(args, kwargs))
        found = self.compiled({name: x.numpy() for name, x in feeds.items()})
        return self.call.build([torch.from_numpy(found[i]) for i in range(len(self.call.outputs))])

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
        has_any = self.model.has_rt_info("framework")
        facts = decode_metadata(self.model.get_rt_info("framework").value if has_any else {})
        return {key: value for key, value in facts.items() if key != CALL}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return tuple(d.get_length() for d in list(self.model.input(0).get_partial_shape())[1:])


def _load_package() -> tuple[Any, Any]:
    try:
        return import_module("openvino"), import_module("openvino.frontend")
    except ImportError as error:
        raise ExportError(
            f"expected the package openvino to run files in OpenVINO, got none ({error}): install "
            "it with pip install 'qat[openvino]'."
        ) from error
