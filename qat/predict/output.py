"""Where predictions go: counted, and on request written to files that a killed run goes on with."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from qat.errors import DataError
from qat.export.checksum import hash_file
from qat.predict.begin import begin
from qat.predict.inputs import Inputs, fingerprint
from qat.predict.ownership import check_target, unreadable_path
from qat.predict.parquet import ParquetWriter, load_pyarrow
from qat.predict.predictor import Prediction
from qat.predict.state import Place, Request, check_place, edited, save
from qat.predict.writer import (
    CsvWriter,
    JsonLinesWriter,
    JsonWriter,
    TableWriter,
    Writer,
    as_it_was,
)

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
        left_out: What was left out before.

    Raises:
        DataError: If less is there than ``place`` says, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        make: Callable[[int], Writer],
        request: Request,
        place: Place,
        left_out: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__()
        self.path, self.request, self.place = path, request, place
        self.left_out = [*left_out]
        if not place.finished:
            with self._writing():
                save(path, request, place)  # first: there is never an output without a state
                self._writer = make(place.size)
                self._list = TableWriter(unreadable_path(path), UNREADABLE, place.unreadable)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"expected room and rights to write '{self.path}' and the files beside it, got "
                f"{error}: free space or correct them; the same command with --resume goes on."
            ) from error

    def add(self, found: Sequence[Prediction], left_out: Sequence[tuple[str, str]]) -> None:
        """Write one batch.

        Raises:
            DataError: If it cannot be written.
        """
        super().add(found, left_out)
        with self._writing():
            self._list.rows(left_out)
            self._writer.write(found)
            if self.place.batches % self._writer.every == 0:
                self._flush()

    def _flush(self, *, finished: bool = False) -> None:
        size, sha256 = self._writer.flush()
        unreadable, unreadable_sha256 = self._list.flush()
        self.place = replace(
            self.place,
            size=size,
            sha256=sha256,
            unreadable=unreadable,
            unreadable_sha256=unreadable_sha256,
            finished=finished,
        )
        save(self.path, self.request, self.place)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish, unless there was an error."""
        if self.place.finished:
            return
        try:
            if kind is None:
                with self._writing():
                    self._writer.finish()
                    self._flush(finished=True)
        finally:
            for writer in (self._writer, self._list):
                with suppress(OSError):  # what was not flushed is done again
                    writer.close()


def open_output(
    kind: str,
    path: Path,
    model: Path,
    inputs: Inputs,
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
        inputs: What is predicted.
        options: ``top``, ``batch`` and whatever else has an influence on the output.
        resume: Whether an output that is there is gone on with.
        force: Whether an output that is there is deleted.

    Raises:
        ConfigError: If the output would replace an input, `begin` refuses, or its state lies.
        DataError: If it cannot be written.
    """
    if kind == "parquet":
        load_pyarrow()
    check_target(path, (model, *inputs.files), is_folder=kind == "parquet")
    request = Request(hash_file(model), fingerprint(inputs.files), {"format": kind, **options})
    place = begin(path, request, resume=resume, force=force)
    check_place(place, path, len(inputs), options["batch"])
    left_out = _read_list(unreadable_path(path), place.unreadable)
    done = min(place.batches * options["batch"], len(inputs))
    if place.predicted + len(left_out) != done:
        raise edited(path, f"says {place.predicted} of {done} were predicted")
    rows = options["batch"] * options["top"]
    make = WRITERS.get(kind, partial(ParquetWriter, rows=rows))
    return FileOutput(path, partial(make, path), request, place, left_out)


def _read_list(path: Path, size: int) -> list[tuple[str, str]]:
    """Return names and reasons in the first bytes of a list, whose hash was checked before."""
    text = path.read_bytes()[:size].decode("utf-8") if size else ""
    rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
    return [(as_it_was(name), as_it_was(reason)) for name, reason in rows]
