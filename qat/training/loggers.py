"""Curves of a run in one CSV file and one TensorBoard file, however often the run was resumed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from qat.files import write_text
from qat.training.event_file import EventFile, cut, event_files


class _Rows(ExperimentWriter):
    """Lightning's writer of rows, which goes on in the file that is there."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        rows = _read_rows(Path(self.metrics_file_path))
        self.metrics_keys = list(rows[0]) if rows else []

    def _check_log_dir_exists(self) -> None:
        """Nothing is deleted."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write_rows(path, fieldnames, _read_rows(path))


class RunCSV(CSVLogger):
    """Metrics as rows of ``metrics.csv``; arguments as of Lightning's ``CSVLogger``."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.log_dir) / "metrics.csv"

    @property
    def experiment(self) -> Any:
        """The writer, on the first process only."""
        if self._experiment is None and _is_first():
            self._experiment = _Rows(self.log_dir)
        return super().experiment

    def position(self) -> int:
        """Return the number of rows so far."""
        if self._experiment is not None:
            self.save()
        return len(_read_rows(self.path))

    def cut(self, rows: int, step: int) -> None:
        """Keep the first ``rows`` and what else belongs to the last of ``step`` optimizer steps."""
        found = _read_rows(self.path)
        if len(found) > rows:
            more = [row for row in found[rows:] if row.get("step") == str(step - 1)]
            _write_rows(self.path, list(found[0]), found[:rows] + more)


class RunTensorBoard(TensorBoardLogger):
    """Metrics for TensorBoard in one event file; arguments as of Lightning's logger."""

    @property
    def experiment(self) -> Any:
        """The writer, on the first process only."""
        if self._experiment is None and _is_first():
            self._experiment = _Writer(log_dir=self.log_dir, **self._kwargs)
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, with errors of the disk as they are.

        Raises:
            OSError: If the file cannot be written.
        """
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:  # Lightning blames the value
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    def save(self) -> None:
        """Write ``hparams.yaml``, whole or not at all.

        Raises:
            OSError: If it cannot be written.
        """
        try:
            super().save()
        except OSError:
            (Path(self.log_dir) / self.NAME_HPARAMS_FILE).unlink(missing_ok=True)
            raise

    def position(self) -> int:
        """Return the bytes of the event file so far."""
        files = event_files(Path(self.log_dir))
        return files[-1].stat().st_size if files else 0

    def cut(self, size: int, step: int) -> None:
        """Keep the first ``size`` bytes and what else belongs to the last of ``step`` steps."""
        if self._experiment is not None:  # it would go on in the file that is replaced
            self._experiment.close()
        for path in event_files(Path(self.log_dir))[-1:]:
            cut(path, size, step)


class _Writer(SummaryWriter):
    """PyTorch's writer, on our event file."""

    def _get_file_writer(self) -> FileWriter:
        if self.all_writers is None or self.file_writer is None:
            self.file_writer = FileWriter.__new__(FileWriter)
            self.file_writer.event_writer = EventFile(Path(self.log_dir))  # pyright: ignore[reportAttributeAccessIssue]
            self.all_writers = {self.file_writer.get_logdir(): self.file_writer}
        return self.file_writer


class LogPositions(pl.Callback):
    """Save with every checkpoint how far the logs were; resumed, go on from there."""

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}
        self._trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose loggers to ask."""
        del pl_module, stage
        self._trainer = trainer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what was logged after the checkpoint; all, for a run that starts anew."""
        del pl_module
        step = self._saved.get("step", 0)
        for logger in _ours(trainer) if trainer.is_global_zero else []:
            start = None if trainer.ckpt_path else 0
            position = self._saved.get(type(logger).__name__, start)
            if position is not None:
                logger.cut(position, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of every log and the optimizer steps until now."""
        if self._trainer is None:
            return {}
        places = {type(log).__name__: log.position() for log in _ours(self._trainer)}
        return {**places, "step": self._trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the positions of the checkpoint."""
        self._saved = dict(state_dict)


def _is_first() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _ours(trainer: pl.Trainer) -> list[RunCSV | RunTensorBoard]:
    return [log for log in trainer.loggers if isinstance(log, RunCSV | RunTensorBoard)]


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _write_rows(path: Path, fields: list[str], rows: list[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
