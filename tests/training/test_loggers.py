"""Curves of a resumed run are in one file, each value once, and a full disk is an error at once."""

import csv
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qat.training import event_file
from qat.training.loggers import RunCSV, RunTensorBoard


def make(kind, folder):
    return kind(folder, name="logs", version=0 if kind is RunCSV else "")


def curve(folder, tag="loss"):
    paths = list(Path(folder).rglob("metrics.csv"))
    if paths:
        rows = csv.DictReader(paths[0].read_text().splitlines())
        return [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
    (path,) = Path(folder).rglob("events.out.*")
    board = EventAccumulator(str(path)).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def log(logger, steps, tag="loss", scale=1):
    for step in steps:
        logger.log_metrics({tag: float(step * scale)}, step)
        logger.save()


@pytest.mark.parametrize("kind", [RunCSV, RunTensorBoard])
def test_a_resumed_curve_is_one_curve(kind, tmp_path):
    first = make(kind, tmp_path)
    log(first, range(5))
    place = first.position()  # a checkpoint after the step 4, of which one value is still to come
    first.log_metrics({"loss": 40.0}, 4)
    log(first, [5, 6], "late")
    first.finalize("success")
    again = make(kind, tmp_path)
    assert again.experiment is not None  # Lightning opens it before a callback acts
    again.cut(place, 5)
    log(again, [5, 6], scale=10)
    log(again, [6], "late")
    again.finalize("success")
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert curve(tmp_path) == expected
    assert curve(tmp_path, "late") == [(6, 6.0)]


@pytest.mark.parametrize("kind", [RunCSV, RunTensorBoard])
def test_a_run_that_starts_anew_drops_what_was_there(kind, tmp_path):
    first = make(kind, tmp_path)
    assert first.position() == 0
    log(first, range(3))
    first.finalize("success")
    again = make(kind, tmp_path)
    assert again.experiment is not None
    again.cut(0, 0)
    log(again, [7])
    again.finalize("success")
    assert curve(tmp_path) == [(7, 7.0)]


@pytest.mark.parametrize("kind", [RunCSV, RunTensorBoard])
def test_what_a_kill_left_half_is_dropped(kind, tmp_path):
    first = make(kind, tmp_path)
    log(first, range(3))
    place = first.position()
    (path,) = [p for p in tmp_path.rglob("*") if p.name.startswith(("metrics", "events"))]
    with path.open("ab") as stream:
        stream.write(b"\x20\0\0")
    again = make(kind, tmp_path)
    again.cut(place, 3)
    log(again, [3])
    assert curve(tmp_path) == [(s, float(s)) for s in range(4)]


def test_a_full_disk_is_an_error_in_the_thread_that_logs(tmp_path, monkeypatch):
    logger = make(RunTensorBoard, tmp_path)
    log(logger, [0])

    def full(handle, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(event_file, "write_all", full)
    with pytest.raises(OSError, match="No space"):
        logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("failed")  # as Lightning does then: it must not wait
    assert os.listdir(tmp_path / "logs")  # noqa: PTH208
