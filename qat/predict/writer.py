"""Predictions in text files that a killed process can go on with: csv, json, json lines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from qat.errors import DataError
from qat.predict.predictor import Prediction


class Writer(Protocol):
    """Writes predictions in order, and says how much of them is safe from a kill.

    Attributes:
        every: Batches after which to :meth:`flush`, so that the files are always the same.
    """

    every: int

    def write(self, predictions: Sequence[Prediction], /) -> None:
        """Take the predictions of one batch."""

    def flush(self) -> int:
        """Put all that was taken in the file; returns its size, which the constructor takes."""
        ...

    def finish(self) -> None:
        """Write what stands behind the last prediction."""

    def close(self) -> None:
        """Let go of the file."""


class TextWriter:
    """A text file, cut off at a size and gone on with.

    Args:
        path: The file.
        size: Bytes of it to keep; 0 begins anew.

    Raises:
        DataError: If it is shorter than that.
    """

    every = 1

    def __init__(self, path: Path, size: int = 0) -> None:
        path.touch()
        if (now := path.stat().st_size) < size:
            raise DataError(
                f"expected at least {size} bytes in '{path}', as when it was stopped, got {now}: "
                "start again with --force."
            )
        os.truncate(path, size)
        self.file = path.open("a", newline="", encoding="utf-8")
        self.begun = size > 0

    def flush(self) -> int:
        """Put all that was taken in the file; returns its size in bytes."""
        self.file.flush()
        return os.fstat(self.file.fileno()).st_size

    def finish(self) -> None:
        """Write what stands behind the last prediction: nothing."""

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


class TableWriter(TextWriter):
    """A .csv with a head; ``columns`` are the names in it, the rest as in `TextWriter`."""

    def __init__(self, path: Path, columns: Sequence[str], size: int = 0) -> None:
        super().__init__(path, size)
        self.table = csv.writer(self.file)
        if not self.begun:
            self.table.writerow(columns)

    def rows(self, rows: Iterable[Sequence[object]]) -> None:
        """Take lines of the table."""
        self.table.writerows(rows)


class CsvWriter(TableWriter):
    """One line for every input and rank."""

    def __init__(self, path: Path, size: int = 0) -> None:
        super().__init__(path, ["file", "rank", "class", "probability"], size)

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Take the predictions of one batch."""
        for p in predictions:
            pairs = enumerate(zip(p.classes, p.probabilities, strict=True), 1)
            self.rows([p.file, rank, name, value] for rank, (name, value) in pairs)


class JsonLinesWriter(TextWriter):
    """One object on each line."""

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Take the predictions of one batch."""
        self.file.writelines(json.dumps(asdict(p)) + "\n" for p in predictions)


class JsonWriter(TextWriter):
    """A list of objects, one on each line."""

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Take the predictions of one batch."""
        for prediction in predictions:
            self.file.write(",\n" if self.begun else "[\n")
            self.file.write(json.dumps(asdict(prediction)))
            self.begun = True

    def finish(self) -> None:
        """Write the end of the list."""
        self.file.write("\n]\n" if self.begun else "[]\n")
