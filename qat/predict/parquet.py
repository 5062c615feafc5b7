"""Predictions in a folder of .parquet files, one for some batches each."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.errors import ConfigError, DataError
from qat.files import replacing
from qat.predict.predictor import Prediction

PART_ROWS = 8192
PARTS = "part-" + 6 * "[0-9]" + ".parquet"


class ParquetWriter:
    """Parts of a table ``file, rank, class, probability``, whole or not there at all.

    Args:
        path: The folder.
        size: Parts of it to keep; 0 begins anew.
        rows: Rows that a full batch has.

    Raises:
        ConfigError: If pyarrow is not installed.
        DataError: If fewer parts are there than that.
    """

    def __init__(self, path: Path, size: int = 0, rows: int = 1) -> None:
        self.arrow, self.parquet = load_pyarrow()
        self.path, self.size = path, size
        self.every = max(1, PART_ROWS // rows)
        self.columns: tuple[list[Any], ...] = ([], [], [], [])
        self.digest = hash_parts(path, size)
        path.mkdir(exist_ok=True)
        remove_parts(path, size)

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Take the predictions of one batch."""
        for p in predictions:
            ranks = range(1, len(p.classes) + 1)
            values = ([p.file] * len(ranks), ranks, p.classes, p.probabilities)
            for column, more in zip(self.columns, values, strict=True):
                column.extend(more)

    def flush(self) -> tuple[int, str]:
        """Write what was taken as one part; returns how many there are, and the hash of all."""
        if self.columns[0]:
            part = self.path / name_part(self.size)
            with replacing(part) as stream:
                self.parquet.write_table(self._table(), stream)
            self.digest.update(part.read_bytes())
            self.size += 1
            self.columns = ([], [], [], [])
        return self.size, self.digest.hexdigest()

    def _table(self) -> Any:
        text, arrow = self.arrow.string(), self.arrow
        kinds = {"file": text, "rank": arrow.int32(), "class": text, "probability": arrow.float64()}
        return arrow.table(list(self.columns), schema=arrow.schema(list(kinds.items())))

    def finish(self) -> None:
        """Write what stands behind the last prediction: nothing."""

    def close(self) -> None:
        """Let go of what was not flushed."""


def name_part(number: int) -> str:
    """Return what a part is called."""
    return f"part-{number:06}.parquet"


def remove_parts(path: Path, size: int = 0) -> None:
    """Delete the parts in a folder but for the first ones, and nothing else.

    One part of ours may stand behind those that a state names, or be half written.
    """
    for part in [*path.glob(PARTS), *path.glob(f".{PARTS}.part")]:
        if part.name.startswith(".") or _number(part) >= size:
            part.unlink()


def find_foreign(path: Path, size: int) -> Path | None:
    """Return a file that is named like a part, but cannot be one of an output of ``size`` parts."""
    foreign = (p for p in sorted(path.glob(PARTS)) if _number(p) > size or not p.is_file())
    return next(foreign, None)


def _number(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))


def hash_parts(path: Path, size: int) -> Any:
    """Return a hash of the first parts in a folder, to which more can be added.

    Raises:
        DataError: If there are fewer.
    """
    digest = hashlib.sha256()
    for number in range(size):
        part = path / name_part(number)
        if not part.is_file():
            raise DataError(
                f"expected {size} parts in '{path}', as when it was stopped, but {part} is "
                "missing: start again with --force."
            )
        digest.update(part.read_bytes())
    return digest


def load_pyarrow() -> tuple[Any, Any]:
    """Return pyarrow and its parquet module.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        return arrow, importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"expected pyarrow for parquet output, but it is not installed ({error}): install it "
            "(pip install pyarrow), or write --csv or --jsonl."
        ) from error
