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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.predict.predictor import Prediction

EPILOG = """
An .npz holds one array, or several of which one is named x or x_test. Inputs are read as they are
needed, so memory stays constant; only what an .npz stores column by column is unpacked whole.

examples:
  python scripts/predict.py runs/resnet_w4a8/TIME/model.onnx digit.png photos/ --top 3
  python scripts/predict.py model.onnx table.npy --csv predictions.csv
"""


def show(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Print predictions, and pass them on."""
    for p in predictions:
        pairs = zip(p.classes, p.probabilities, strict=True)
        print(f"{p.file}: " + ", ".join(f"{name} {value:.2%}" for name, value in pairs))
        yield p


def run(arguments: argparse.Namespace) -> int:
    """Predict, print, write; returns the exit status."""
    from qat.errors import DataError
    from qat.predict.batches import Batches, read_batches
    from qat.predict.inputs import Inputs, list_files
    from qat.predict.predictor import open_model, predict
    from qat.predict.reader import Reader
    from qat.predict.writer import write_csv, write_json

    files = list_files(arguments.inputs)
    model, facts = open_model(arguments.model)
    reader = Reader(model.input_shape, facts["mean"], facts["std"], arguments.crop)
    batches = Batches(Inputs(files, reader), arguments.batch)
    left_out: list[tuple[str, str]] = []

    def predictions() -> Iterator[Prediction]:
        for batch in read_batches(batches, arguments.workers):
            left_out.extend(batch.left_out)
            yield from predict(model, facts["classes"], batch, arguments.top)

    found = show(predictions())
    path = arguments.json or arguments.csv
    if path is None:
        count = sum(1 for _ in found)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            count = (write_json if arguments.json else write_csv)(found, file)
    for name, reason in left_out:
        print(f"left out {name}: {reason}", file=sys.stderr)
    if count == 0:
        raise DataError("expected at least one input that can be read, got none: see above.")
    return 0


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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL.onnx", type=Path, help="a file that qat exported")
    parser.add_argument(
        "inputs", metavar="INPUT", type=Path, nargs="+", help="image, folder of images, .npy, .npz"
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
    output.add_argument("--json", metavar="FILE", type=Path, help="also write a list of objects")
    output.add_argument(
        "--csv", metavar="FILE", type=Path, help="also write file, rank, class, ..."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    arguments = parse(argv)
    from qat.cli import guard

    return guard(lambda: run(arguments), show_traceback=arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
