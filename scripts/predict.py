"""Classes and probabilities of your own images or arrays, from an exported .onnx file.

Images are converted to the model's channels (grey or RGB), resized to its input (bilinear,
antialiased), scaled to 0..1 from black to white, and normalised with the mean and std stored in the
file. uint8 arrays, (N, H, W) or (N, H, W, C), are images and treated alike. Float arrays are
samples in the model's own shape, (N, C, H, W) or (N, F), with pixels in 0..1; they are normalised
too. What cannot be read is left out and listed at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from qat.export.runtime import OnnxModel

ARRAYS = (".npy", ".npz")
EPILOG = """
An .npz holds one array, or several of which one is named x or x_test. Inputs are read as they are
needed, except that an .npz is unpacked whole.

examples:
  python scripts/predict.py runs/resnet_w4a8/TIME/model.onnx digit.png photos/ --top 3
  python scripts/predict.py model.onnx table.npy --csv predictions.csv
"""


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one input, best first, and their probabilities, 0 to 1."""

    file: str
    classes: list[str]
    probabilities: list[float]


@dataclass
class Reader:
    """Turns files into normalised samples of one shape, and remembers what it could not read.

    Attributes:
        shape: Shape of a sample as the model takes it.
        mean: Subtracted from each channel, if there is one.
        std: Divides each channel afterwards.
        crop: Whether images are cropped at the centre, as the folder data do to evaluate.
        unreadable: Name and reason of every input that was left out.
    """

    shape: tuple[int, ...]
    mean: list[float] | None
    std: list[float] | None
    crop: bool = False
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def read(self, files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and sample of every input that can be read."""
        from qat.errors import DataError

        for file in files:
            try:
                yield from self._array(file) if file.suffix in ARRAYS else self._image(file)
            except DataError as error:
                self.unreadable.append((str(file), str(error)))

    def _image(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        yield str(file), self._normalise(self._pixels(open_image(file), file))

    def _array(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        import numpy as np
        import torch
        from PIL import Image

        array = open_array(file)
        check_array(array, self.shape, file)
        for i, values in enumerate(array):
            name = f"{file}[{i}]"
            if values.dtype == "uint8":
                grey = values.shape[2:] == (1,)
                image = Image.fromarray(np.array(values[..., 0] if grey else values))
                yield name, self._normalise(self._pixels(image, file))
            elif np.isfinite(values).all():
                sample = torch.from_numpy(np.array(values, dtype=np.float32))
                yield name, self._normalise(sample)
            else:
                self.unreadable.append((name, "expected numbers, got NaN or infinity"))

    def _pixels(self, image: Any, file: Path) -> Tensor:
        """Return an image with channels and size of the model, uint8 ``(C, H, W)``."""
        from torchvision.transforms import functional

        from qat.data.folder import CROP_RATIO
        from qat.errors import DataError

        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise DataError(
                f"expected float samples of shape {self.shape} for this model, got an image in "
                f"'{file}': save them as an .npy of shape (N, ...)."
            )
        channels, *size = self.shape
        image = image.convert("L" if channels == 1 else "RGB")
        if self.crop:
            image = functional.resize(image, [round(max(size) / CROP_RATIO)])
            image = functional.center_crop(image, size)
        return functional.pil_to_tensor(functional.resize(image, size))

    def _normalise(self, sample: Tensor) -> Tensor:
        """Return ``sample`` as the data modules would, with their arithmetic; float32."""
        import torch

        from qat.data.tensors import TensorSource

        source = TensorSource(sample[None], torch.zeros(1), self.mean, self.std)
        return source.__getitems__([(0, 0)])[0][0]


def open_image(file: Path) -> Image.Image:
    """Return an image file, decoded, as RGB.

    Raises:
        DataError: If it cannot be decoded.
    """
    from qat.data.folder import read_image
    from qat.errors import DataError

    try:
        return read_image(str(file))
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise DataError(f"expected an image, got {type(error).__name__} ({error})") from error


def open_array(file: Path) -> np.ndarray:
    """Return the array of an .npy or .npz file, the former without reading it yet.

    Raises:
        DataError: If there is none, or it is not clear which.
    """
    import numpy as np

    from qat.errors import DataError

    try:
        if file.suffix == ".npy":
            return np.lib.format.open_memmap(file, mode="r")
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            names: list[str] = content.files
            chosen = names if len(names) == 1 else [n for n in ("x", "x_test") if n in names]
            if chosen:
                return content[chosen[0]]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"expected an array in '{file}', got {type(error).__name__} ({error}): write it with "
            "numpy.save."
        ) from error
    raise DataError(
        f"expected one array, or one named x or x_test, in '{file}', got {', '.join(names)}: "
        "save only what is to be predicted."
    )


def check_array(array: np.ndarray, shape: tuple[int, ...], file: Path) -> None:
    """Check that an array holds images, or samples as the model takes them.

    Raises:
        DataError: If it does not.
    """
    from qat.errors import DataError

    is_image = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] in (1, 3))
    fits = is_image if array.dtype == "uint8" else array.shape[1:] == shape
    if not fits or array.dtype.kind not in "uf" or (array.dtype.kind == "u" and array.itemsize > 1):
        wanted = ", ".join(["N", *map(str, shape)])
        raise DataError(
            f"expected floats ({wanted}), or uint8 images (N, H, W, C) with 1 or 3 channels, in "
            f"'{file}', got {array.dtype} of shape {array.shape}: convert it."
        )


def list_files(inputs: Iterable[Path]) -> list[Path]:
    """Return the files that the inputs name: those of a folder are its images, sorted.

    Raises:
        DataError: If an input does not exist, or a folder holds no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from qat.errors import DataError

    files: list[Path] = []
    for path in inputs:
        found = [path]
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            found = sorted(p for p in inside if p.is_file())
        if not found or not found[0].exists():
            raise DataError(
                f"expected an image, an array or a folder of images, got '{path}', which "
                f"{'holds no image' if path.is_dir() else 'does not exist'}: correct the path."
            )
        files += found
    return files


def open_model(file: Path) -> tuple[OnnxModel, dict[str, Any]]:
    """Return the model of a file that we exported, and what is stored in it about its data.

    Raises:
        ExportError: If it is another kind of file.
    """
    from qat.errors import ExportError
    from qat.export.runtime import OnnxModel

    model = OnnxModel(file)
    facts = model.metadata
    missing = sorted({"classes", "mean", "std"} - facts.keys())
    if missing:
        raise ExportError(
            f"expected a model exported by qat, got '{file}' without {', '.join(missing)} in its "
            "metadata: how its inputs are to be normalised is not known; export it with qat."
        )
    return model, facts


def predict(
    model: OnnxModel, classes: Sequence[str], samples: Iterator[tuple[str, Tensor]], batch: int
) -> Iterator[Prediction]:
    """Yield the probabilities of all classes for every sample, sorted, batch after batch."""
    import torch

    while chunk := list(islice(samples, batch)):
        logits = model(torch.stack([sample for _, sample in chunk]))
        order = logits.argsort(dim=1, descending=True, stable=True)
        values = logits.double().softmax(1).gather(1, order)
        for (name, _), best, shares in zip(chunk, order.tolist(), values.tolist(), strict=True):
            yield Prediction(name, [classes[int(i)] for i in best], shares)


def show(predictions: Iterable[Prediction], top: int) -> Iterator[Prediction]:
    """Print the ``top`` classes of every prediction, and pass them on."""
    for p in predictions:
        best = Prediction(p.file, p.classes[:top], p.probabilities[:top])
        pairs = zip(best.classes, best.probabilities, strict=True)
        print(f"{p.file}: " + ", ".join(f"{name} {value:.2%}" for name, value in pairs))
        yield best


def write_json(predictions: Iterable[Prediction], file: TextIO) -> int:
    """Write a list of objects, one on each line; returns how many."""
    count = 0
    for count, prediction in enumerate(predictions, 1):
        file.write("[\n" if count == 1 else ",\n")
        file.write(json.dumps(asdict(prediction)))
    file.write("\n]\n" if count else "[]\n")
    return count


def write_csv(predictions: Iterable[Prediction], file: TextIO) -> int:
    """Write one line for every input and rank; returns how many inputs."""
    count, writer = 0, csv.writer(file)
    writer.writerow(["file", "rank", "class", "probability"])
    for p in predictions:
        pairs = enumerate(zip(p.classes, p.probabilities, strict=True), 1)
        writer.writerows([p.file, rank, name, value] for rank, (name, value) in pairs)
        count += 1
    return count


def run(arguments: argparse.Namespace) -> int:
    """Predict, print, write; returns the exit status."""
    from qat.errors import DataError

    files = list_files(arguments.inputs)
    model, facts = open_model(arguments.model)
    reader = Reader(model.input_shape, facts["mean"], facts["std"], arguments.crop)
    samples = reader.read(files)
    found = show(predict(model, facts["classes"], samples, arguments.batch), arguments.top)
    path = arguments.json or arguments.csv
    if path is None:
        count = sum(1 for _ in found)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            count = (write_json if arguments.json else write_csv)(found, file)
    for name, reason in reader.unreadable:
        print(f"left out {name}: {reason}", file=sys.stderr)
    if count == 0:
        raise DataError("expected at least one input that can be read, got none: see above.")
    return 0


def positive(text: str) -> int:
    """Return ``text`` as a number of at least 1."""
    if (value := int(text)) < 1:
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
