"""Accuracy of a training checkpoint, a float checkpoint or an .onnx file on a data set."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.files import write_text
from qat.stored_config import add_allow
from qat.terminal import show, terminal

if TYPE_CHECKING:
    from torch import Tensor

    from qat.data import DataModule
    from qat.export.runtime import OnnxModel
    from qat.restore import Checkpoint

EPILOG = """
FILE is one of
  a training checkpoint of ours   model and data come from the config inside it
  an .onnx file                   data come from the config.yaml beside it, or from overrides
  a float checkpoint (.pt, ...)   overrides give model and data: recipe=... or model=... data=...

examples:
  python scripts/evaluate.py runs/resnet_w4a8/TIME/checkpoints/last.ckpt
  python scripts/evaluate.py runs/resnet_w4a8/TIME/model.onnx --split val
  python scripts/evaluate.py model.onnx data=arrays data.path=mine.npz --json result.json
  python scripts/evaluate.py resnet20.pt recipe=resnet_w4a8
"""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a function from a batch to logits, data that fit it, a word about it."""

    kind: str
    run: Callable[..., Any]
    data: DataModule
    shown: str


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="what to evaluate")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="as on the command line of train.py"
    )
    parser.add_argument("--data", metavar="GROUP", help="short for data=GROUP")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: test")
    add_allow(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result here")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.data is not None:
        arguments.overrides.insert(0, f"data={arguments.data}")
    return arguments


def load(file: Path, overrides: Sequence[str], allow: Sequence[str] = ()) -> Subject:
    """Return what ``file`` holds, with its data.

    Args:
        file: A checkpoint or an .onnx file.
        overrides: Words of the command line.
        allow: What a config out of a file may build beside what our own configs name.

    Raises:
        QatError: If the file is none of the three kinds, or the data do not fit it.
    """
    from qat.restore import read_checkpoint

    if file.suffix == ".onnx":
        return load_onnx(file, overrides, allow)
    ours = None if file.suffix == ".safetensors" else read_checkpoint(file)
    return load_float(file, overrides) if ours is None else load_ours(ours, overrides, allow)


def load_ours(
    checkpoint: Checkpoint, overrides: Sequence[str], allow: Sequence[str] = ()
) -> Subject:
    """Return the model of a training checkpoint, in the phase that it was saved in."""
    from qat.compose import compose_data
    from qat.restore import restore
    from qat.training.evaluate import inference
    from qat.training.phases import phase_of

    changes = compose_data(overrides, checkpoint.config, checkpoint.path, allow)
    setup = restore(checkpoint, changes, allow)
    shown = f"training checkpoint, phase {phase_of(setup.captured)}"
    return Subject("checkpoint", inference(setup.captured), setup.data, shown)


def load_float(file: Path, overrides: Sequence[str]) -> Subject:
    """Return the float model of the composed config, with the weights of ``file``."""
    from qat.assemble import make_model
    from qat.calls import Call
    from qat.compose import compose_plain
    from qat.errors import ConfigError
    from qat.models import load_checkpoint
    from qat.outputs import Outputs, choose_prediction

    if not overrides:
        raise ConfigError(
            f"expected model and data for '{file}', which is no training checkpoint of ours, got "
            "none: add recipe=..., or model=... and data=..."
        )
    config = compose_plain(overrides)
    data = make_data(config)
    model = make_model(config["model"], data.num_classes, data.input_shape)
    load_checkpoint(model, file, config["ckpt_key"])
    result = Call.of(data.calibration_batches(1)[0]).take(2).on(model.eval())
    wanted = config["prediction"]
    chosen = choose_prediction({"eval": Outputs.of(result)}, wanted, data.num_classes)
    return Subject("float", partial(predict_with, model, chosen), data, "float checkpoint")


def predict_with(model: Any, name: str | None, *args: Any, **kwargs: Any) -> Tensor:
    """Return the output of that name of what a model makes of one call."""
    from qat.outputs import find_prediction

    return find_prediction(model(*args, **kwargs), name)


def load_onnx(file: Path, overrides: Sequence[str], allow: Sequence[str] = ()) -> Subject:
    """Return the model of an .onnx file, with the data of its run or of the overrides."""
    from qat.compose import compose_data, read_config
    from qat.errors import ConfigError
    from qat.export.runtime import OnnxModel

    model = OnnxModel(file)
    beside = file.parent / "config.yaml"
    if not beside.is_file() and not any(o.startswith(("data=", "recipe=")) for o in overrides):
        raise ConfigError(
            f"expected data for '{file}', got neither overrides nor a config.yaml beside it: add "
            "data=... (and data.path=... or the like)."
        )
    run = read_config(beside) if beside.is_file() else None
    data = make_data(compose_data(overrides, run, beside, allow))
    check_fit(model, data, file)
    return Subject("onnx", model, data, "in onnxruntime")


def make_data(config: Mapping[str, Any]) -> DataModule:
    """Return the data of a config, loaded."""
    from qat.assemble import make

    data: DataModule = make(config["data"], seed=config["seed"])
    data.setup()
    return data


def check_fit(model: OnnxModel, data: DataModule, file: Path) -> None:
    """Compare what the file says about its data with the data.

    Raises:
        DataError: If number of classes, shape or normalisation differ.
    """
    from qat.errors import DataError

    facts = model.metadata
    pairs: dict[str, tuple[Any, Any]] = {
        "number of classes": (model.prediction_shape[-1], data.num_classes),
    }
    if model.signature is None:  # several inputs are compared when they are passed
        pairs["shape"] = (list(model.input_shape), list(data.input_shape))
    for name, value in (("mean", data.mean), ("std", data.std)):
        if name in facts:
            pairs[name] = (facts[name], value and list(value))
    for what, (wanted, got) in pairs.items():
        if wanted != got:
            raise DataError(
                f"expected data like those '{file}' was made for, {what} {wanted}, got {what} "
                f"{got}: choose other data, or correct their settings."
            )


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate, print, write; returns the exit status."""
    from qat.training.evaluate import predict, score

    subject = load(arguments.file, arguments.overrides, arguments.allow)
    is_test = arguments.split == "test"
    batches = subject.data.test_dataloader() if is_test else subject.data.val_dataloader()
    logits, labels = predict(subject.run, batches)
    found = score(logits, labels)
    result = {
        "accuracy": found.accuracy,
        "perplexity": found.perplexity,
        "samples": len(labels),
        "split": arguments.split,
        "file": str(arguments.file),
        "kind": subject.kind,
    }
    show(f"{arguments.file} ({subject.shown})")
    shown = f"accuracy {found.accuracy:.2f} %, perplexity {found.perplexity:.3f}"
    show(f"{shown} on {len(labels):,} {arguments.split} samples")
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(result, indent=2) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    arguments = parse(argv)
    from qat.cli import guard

    return guard(lambda: evaluate(arguments), show_traceback=arguments.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
