"""Predictions in text files that a killed process can go on with: csv, json, json lines."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from qat.errors import DataError
from qat.predict.predictor import Prediction
from qat.terminal import escape

CHUNK = 1 << 20
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001  spreadsheets take the wide ones, too


class Writer(Protocol):
    """Writes predictions in order, and says how much of them is safe from a kill.

    Attributes:
        every: Batches after which to :meth:`flush`, so that the files are always the same.
    """

    every: int

    def write(self, predictions: Sequence[Prediction], /) -> None:
        """Take the predictions of one batch."""

    def flush(self) -> tuple[int, str]:
        """Put all that was taken in the file; returns its size and the hash of what is in it."""
        ...

    def finish(self) -> None:
        """Write what stands behind the last prediction."""

    def close(self) -> None:
        """Let go of the file."""


class TextWriter:
    """A text file in UTF-8, cut off at a size and gone on with.

    Args:
        path: The file.
        size: Bytes of it to keep; 0 begins anew.

    Raises:
        DataError: If it is shorter than that.
    """

    every = 1

    def __init__(self, path: Path, size: int = 0) -> None:
        self.digest = hash_start(path, size)
        path.touch()
        os.truncate(path, size)
        self.size = size
        self.file = path.open("ab")

    def put(self, text: str) -> None:
        """Take some text."""
        content = text.encode("utf-8", "backslashreplace")
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def flush(self) -> tuple[int, str]:
        """Put all that was taken in the file; returns its size in bytes and its hash."""
        self.file.flush()
        return self.size, self.digest.hexdigest()

    def finish(self) -> None:
        """Write what stands behind the last prediction: nothing."""

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


class TableWriter(TextWriter):
    """A .csv with a head; ``columns`` are the names in it, the rest as in `TextWriter`."""

    def __init__(self, path: Path, columns: Sequence[str], size: int = 0) -> None:
        super().__init__(path, size)
        self.table = csv.writer(_Lines(self))
        if not size:
            self.table.writerow(columns)

    def rows(self, rows: Iterable[Sequence[object]]) -> None:
        """Take lines of the table; texts in them are escaped for terminals and `harmless`."""
        for row in rows:
            self.table.writerow([harmless(escape(c)) if isinstance(c, str) else c for c in row])


class _Lines:
    """What csv writes to."""

    def __init__(self, writer: TextWriter) -> None:
        self.write = writer.put


def harmless(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula: with an apostrophe before it."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULA) else text


def as_it_was(cell: str) -> str:
    """Return the text that became a cell."""
    return cell[1:] if cell.startswith("'") and harmless(cell[1:]) == cell else cell


def hash_start(path: Path, size: int) -> Any:
    """Return a hash of the first bytes of a file, to which more can be added.

    Raises:
        DataError: If there are fewer.
    """
    digest = hashlib.sha256()
    rest = size
    if rest and path.exists():
        with path.open("rb") as file:
            while rest and (chunk := file.read(min(rest, CHUNK))):
                digest.update(chunk)
                rest -= len(chunk)
    if rest:
        raise DataError(
            f"expected at least {size} bytes in '{path}', as when it was stopped, got "
            f"{size - rest}: start again with --force."
        )
    return digest


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
        for prediction in predictions:
            self.put(json.dumps(asdict(prediction)) + "\n")


class JsonWriter(TextWriter):
    """A list of objects, one on each line."""

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Take the predictions of one batch."""
        for prediction in predictions:
            self.put(",\n" if self.size else "[\n")
            self.put(json.dumps(asdict(prediction)))

    def finish(self) -> None:
        """Write the end of the list."""
        self.put("\n]\n" if self.size else "[]\n")
