"""Classes and probabilities of your own images or arrays, from an exported .onnx file.

Images are converted to the model's channels (grey or RGB), resized to its input (bilinear,
antialiased), scaled to 0..1 from black to white, and normalised with the mean and std stored in the
file. uint8 arrays, (N, H, W) or (N, H, W, C), are images and treated alike. Float arrays are
samples in the model's own shape, (N, C, H, W) or (N, F), with pixels in 0..1; they are normalised
too. What cannot be read is left out and listed at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.terminal import escape, terminal

if TYPE_CHECKING:
    from qat.predict.inputs import Inputs
    from qat.predict.output import Output
    from qat.predict.predictor import Prediction

OUTPUTS = {
    "json": "a list of objects",
    "jsonl": "an object a line",
    "csv": "file, rank, class, ...",
    "parquet": "a folder of parts of such a table",
}
EPILOG = """
An .npz holds one array, or several of which one is named x or x_test. Inputs are read as they are
needed, so memory stays constant; only what an .npz stores column by column is unpacked whole.

Beside an output FILE, FILE.unreadable.csv lists what was left out, and FILE.state.json says how far
it has come and for which model, inputs and options: --resume only goes on with the same, and ends
with the bytes of a run that was never stopped. A new FILE is begun by either. --force replaces only
files of its own, known by that state; inputs, devices and files of others stay. What was edited
since is not gone on with. In a .csv, names that a spreadsheet would compute (= + - @) begin with '.

examples:
  python scripts/predict.py runs/resnet_w4a8/TIME/model.onnx digit.png photos/ --top 3
  python scripts/predict.py model.onnx table.npy --csv predictions.csv
  python scripts/predict.py model.onnx photos/ --jsonl predictions.jsonl --resume --workers 4
"""


def run(arguments: argparse.Namespace) -> int:
    """Predict, print, write; returns the exit status."""
    from qat.errors import DataError
    from qat.predict.batches import Batches, check_batch, read_batches
    from qat.predict.inputs import Inputs, list_files
    from qat.predict.predictor import open_model, predict
    from qat.predict.progress import Bar
    from qat.predict.reader import Reader

    files = list_files(arguments.inputs)
    model, facts = open_model(arguments.model)
    reader = Reader(model.input_shape, facts["mean"], facts["std"], arguments.crop)
    inputs = Inputs(files, reader)
    check_batch(arguments.batch, arguments.workers, inputs)
    output = choose_output(arguments, inputs)
    batches = Batches(inputs, arguments.batch)
    start = output.place.batches
    with output, Bar(len(inputs), start * arguments.batch) as bar:
        for batch in read_batches(batches, arguments.workers, start):
            found, left_out = predict(model, facts["classes"], batch, arguments.top)
            output.add(found, left_out)
            print_all(found)
            bar.advance(len(batch))
    for name, reason in output.left_out:
        sys.stderr.write(escape(f"left out {name}: {reason}") + "\n")
    bar.close(output.place.predicted, len(output.left_out))
    if output.place.predicted == 0:
        raise DataError("expected at least one input that can be read, got none: see above.")
    return 0


def print_all(predictions: Iterable[Prediction]) -> None:
    """Print predictions, a line each."""
    for p in predictions:
        pairs = zip(p.classes, p.probabilities, strict=True)
        line = f"{p.file}: " + ", ".join(f"{name} {value:.2%}" for name, value in pairs)
        print(escape(line))


def choose_output(arguments: argparse.Namespace, inputs: Inputs) -> Output:
    """Return where the predictions go besides the screen.

    Raises:
        ConfigError: If there is nothing to resume or to replace, or it cannot be.
        DataError: If it cannot be written.
    """
    from qat.errors import ConfigError
    from qat.predict.output import Output, open_output

    again = {"resume": arguments.resume, "force": arguments.force}
    options = {key: getattr(arguments, key) for key in ("top", "batch", "crop")}
    for kind in OUTPUTS:
        if path := getattr(arguments, kind):
            return open_output(kind, path, arguments.model, inputs, options, **again)
    if any(again.values()):
        raise ConfigError(
            "expected an output with --resume or --force, got none: add --csv, --jsonl, ..."
        )
    return Output()


def positive(text: str) -> int:
    """Return ``text`` as a number of at least 1."""
    if (value := natural(text)) < 1:
        raise ValueError
    return value


def natural(text: str) -> int:
    """Return ``text`` as a number of at least 0."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def path(text: str) -> Path:
    """Return ``text`` as a path; none is no folder, which a variable that is not set would be."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL.onnx", type=path, help="a file that qat exported")
    parser.add_argument(
        "inputs", metavar="INPUT", type=path, nargs="+", help="image, folder of images, .npy, .npz"
    )
    number: dict[str, Any] = {"metavar": "N", "type": positive}
    parser.add_argument("--top", **number, default=1, help="classes to show for each (default: 1)")
    parser.add_argument("--batch", **number, default=64, help="samples at once (default: 64)")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=natural,
        help="processes that read ahead (default: one for each core but one, none for few images)",
    )
    parser.add_argument(
        "--crop",
        action="store_true",
        help="crop images at the centre instead of squeezing them, as data=folder does to evaluate",
    )
    output = parser.add_mutually_exclusive_group()
    for kind, text in OUTPUTS.items():
        output.add_argument(f"--{kind}", metavar="FILE", type=path, help=f"also write {text}")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an output that is there")
    again.add_argument("--force", action="store_true", help="replace an output that is there")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    arguments = parse(argv)
    from qat import signals
    from qat.cli import guard

    signals.advise(lambda: "--resume goes on with the output, if one was asked for")
    return guard(lambda: run(arguments), show_traceback=arguments.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
