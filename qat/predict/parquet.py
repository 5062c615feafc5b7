"""Predictions in a folder of .parquet files, one for some batches each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.errors import ConfigError, DataError
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
        path.mkdir(exist_ok=True)
        kept = {self._part(number) for number in range(size)}
        if missing := sorted(str(part) for part in kept if not part.is_file()):
            raise DataError(
                f"expected {size} parts in '{path}', as when it was stopped, but {missing[0]} is "
                "missing: start again with --force."
            )
        remove_parts(path, kept)

    def _part(self, number: int) -> Path:
        return self.path / f"part-{number:06}.parquet"

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Take the predictions of one batch."""
        for p in predictions:
            ranks = range(1, len(p.classes) + 1)
            values = ([p.file] * len(ranks), ranks, p.classes, p.probabilities)
            for column, more in zip(self.columns, values, strict=True):
                column.extend(more)

    def flush(self) -> int:
        """Write what was taken as one part; returns how many parts there are."""
        if self.columns[0]:
            part = self._part(self.size)
            hidden = part.with_name(f".{part.name}")
            self.parquet.write_table(self._table(), hidden)
            hidden.replace(part)
            self.size += 1
            self.columns = ([], [], [], [])
        return self.size

    def _table(self) -> Any:
        text, arrow = self.arrow.string(), self.arrow
        kinds = {"file": text, "rank": arrow.int32(), "class": text, "probability": arrow.float64()}
        return arrow.table(list(self.columns), schema=arrow.schema(list(kinds.items())))

    def finish(self) -> None:
        """Write what stands behind the last prediction: nothing."""

    def close(self) -> None:
        """Let go of what was not flushed."""


def remove_parts(path: Path, kept: set[Path] | None = None) -> None:
    """Delete the parts in a folder but for those that are ``kept``, and nothing else."""
    for part in [*path.glob(PARTS), *path.glob(f".{PARTS}")]:
        if part not in (kept or ()):
            part.unlink()


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
