"""What artifacts are compared with: the float model of their run, and static quantization.

The float model is built again from the config of the run, with the float weights of its checkpoint;
without a checkpoint they are random, which changes no time. Static quantization is onnxruntime's
own: what one gets without any training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subject import Subject
    from torch import nn

CHECKPOINTS = ("best.ckpt", "last.ckpt")
DOWNLOADED = ("weights", "pretrained")
SAMPLES = 8  # that static quantization sees


def read_model(artifact: Path) -> tuple[dict[str, Any], int] | None:
    """Return how the model of a run is built and its number of classes.

    Args:
        artifact: The ``.onnx`` file of the run; without a config beside it there is no run.

    Raises:
        ConfigError: If the config is none, or the file does not name its classes.
    """
    from qat.compose import read_config
    from qat.errors import ConfigError
    from qat.export.runtime import OnnxModel
    from qat.stored_config import check_stored

    config = artifact.parent / "config.yaml"
    if not config.is_file():
        return None
    run, classes = read_config(config), OnnxModel(artifact).metadata.get("classes")
    check_stored(run, ["model"], config)
    node = run.get("model")
    if not isinstance(node, dict) or not isinstance(classes, list):
        raise ConfigError(
            f"expected a model in '{config}' and classes in the metadata of '{artifact}', got "
            f"model {node} and classes {classes}: name the float file with --float FILE.onnx."
        )
    if "_target_" not in node:
        node = {key: value for key, value in node.items() if key not in DOWNLOADED}
    return node, len(classes)


def build_float(node: dict[str, Any], classes: int, artifact: Subject) -> nn.Module:
    """Return the float model of a run, with the float weights of its checkpoint.

    Args:
        node: How it is built, from the config.
        classes: Classes of its data.
        artifact: The file of the run.

    Raises:
        QatError: If the model cannot be built, or the checkpoint does not fit it.
    """
    from qat.assemble import make_model
    from qat.models import load_checkpoint

    model = make_model(node, classes, artifact.shape)
    saved = [artifact.path.parent / "checkpoints" / name for name in CHECKPOINTS]
    for path in [path for path in saved if path.is_file()][:1]:
        load_checkpoint(model, path)
    return model.eval()


def export_float(model: nn.Module, artifact: Subject, path: Path) -> None:
    """Write a float model as an ``.onnx`` file with a dynamic batch axis.

    Raises:
        ExportError: If one of its operations has no ONNX form.
    """
    import torch

    from qat.errors import ExportError
    from qat.export.onnx import INPUT, OPSET, OUTPUT

    try:
        torch.onnx.export(
            model,
            (artifact.batch(2),),  # a batch of one would be taken for a constant
            path,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    except Exception as error:
        raise ExportError(
            f"expected the float model of '{artifact.name}' to have an ONNX form, got "
            f"{_reason(error)}: name its file with --float FILE.onnx."
        ) from error


def pack_float(model: nn.Module, artifact: Subject, path: Path) -> None:
    """Write a float model as a ``.safetensors`` file with its graph, for runtimes of PyTorch.

    Raises:
        QatError: If it cannot be traced.
    """
    from torch import fx

    from qat.export.packed import save_packed
    from qat.graph.trace import capture

    example = artifact.batch(2)
    captured = capture(model, example)
    save_packed(fx.GraphModule(captured, captured.graphs["eval"]), example, path, metadata={})


def quantize_statically(source: Subject, path: Path) -> None:
    """Write what onnxruntime's static quantization makes of a float file, on random data.

    Quantize/Dequantize, uint8 activations, int8 weights with a scale for each channel.

    Raises:
        ExportError: If onnxruntime cannot quantize it.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from qat.errors import ExportError

    prepared = path.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(source.path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            _make_reader(source),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    except Exception as error:
        raise ExportError(
            f"expected onnxruntime to quantize '{source.name}' statically, got {_reason(error)}: "
            "leave out --static."
        ) from error


def _make_reader(source: Subject) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """Hands out random samples one by one, and ``None`` at the end."""

        def __init__(self) -> None:
            self.rest = iter(source.batch(SAMPLES).numpy())

        def get_next(self) -> Any:
            sample = next(self.rest, None)
            return None if sample is None else {source.input_name: sample[None]}

    return Reader()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
