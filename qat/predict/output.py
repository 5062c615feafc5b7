"""Where predictions go: counted, and on request written to files that a killed run goes on with."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from qat.errors import ConfigError
from qat.predict.inputs import fingerprint
from qat.predict.parquet import ParquetWriter, load_pyarrow
from qat.predict.predictor import Prediction
from qat.predict.state import Place, Request, begin, hash_file, save, unreadable_path
from qat.predict.writer import CsvWriter, JsonLinesWriter, JsonWriter, TableWriter, Writer

UNREADABLE = ["file", "reason"]
WRITERS: dict[str, Callable[[Path, int], Writer]] = {
    "csv": CsvWriter,
    "json": JsonWriter,
    "jsonl": JsonLinesWriter,
}


class Output:
    """Counts what was predicted and keeps what was left out, without any file."""

    def __init__(self) -> None:
        self.place = Place()
        self.left_out: list[tuple[str, str]] = []

    def add(self, found: Sequence[Prediction], left_out: Sequence[tuple[str, str]]) -> None:
        """Take one batch."""
        batches, predicted = self.place.batches + 1, self.place.predicted + len(found)
        self.place = replace(self.place, batches=batches, predicted=predicted)
        self.left_out += left_out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish, unless there was an error."""


class FileOutput(Output):
    """Also writes both, batch by batch, so that what a kill leaves can be gone on with.

    Args:
        path: The output.
        make: What opens it, given the size to keep.
        request: What it is made of.
        place: Where to go on.

    Raises:
        DataError: If less is there than ``place`` says.
    """

    def __init__(
        self, path: Path, make: Callable[[int], Writer], request: Request, place: Place
    ) -> None:
        super().__init__()
        self.path, self.request, self.place = path, request, place
        if not place.finished:
            save(path, request, place)  # first, so that there is never an output without a state
            self._writer = make(place.size)
            self._list = TableWriter(unreadable_path(path), UNREADABLE, place.unreadable)
        with unreadable_path(path).open(newline="", encoding="utf-8") as file:
            self.left_out = [(row[0], row[1]) for row in list(csv.reader(file))[1:]]

    def add(self, found: Sequence[Prediction], left_out: Sequence[tuple[str, str]]) -> None:
        """Write one batch."""
        super().add(found, left_out)
        self._list.rows(left_out)
        self._writer.write(found)
        if self.place.batches % self._writer.every == 0:
            self._flush()

    def _flush(self, *, finished: bool = False) -> None:
        sizes = {"size": self._writer.flush(), "unreadable": self._list.flush()}
        self.place = replace(self.place, **sizes, finished=finished)
        save(self.path, self.request, self.place)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish, unless there was an error."""
        if self.place.finished:
            return
        if kind is None:
            self._writer.finish()
            self._flush(finished=True)
        self._writer.close()
        self._list.close()


def open_output(
    kind: str,
    path: Path,
    model: Path,
    files: Sequence[Path],
    options: dict[str, Any],
    *,
    resume: bool = False,
    force: bool = False,
) -> FileOutput:
    """Return an output at the place where it is to be gone on with.

    Args:
        kind: ``csv``, ``json``, ``jsonl`` or ``parquet``.
        path: The output.
        model: The model file.
        files: What is predicted.
        options: ``top``, ``batch`` and whatever else has an influence on the output.
        resume: Whether an output that is there is gone on with.
        force: Whether an output that is there is deleted.

    Raises:
        ConfigError: If the output would replace an input, or `begin` refuses.
    """
    if path.absolute() in {file.absolute() for file in (model, *files)}:
        raise ConfigError(f"expected an output that is no input, got '{path}': choose another.")
    make = partial(ParquetWriter, rows=options["batch"] * options["top"])
    if kind == "parquet":
        load_pyarrow()
    request = Request(hash_file(model), fingerprint(files), {"format": kind, **options})
    place = begin(path, request, resume=resume, force=force)
    return FileOutput(path, partial(WRITERS.get(kind, make), path), request, place)
