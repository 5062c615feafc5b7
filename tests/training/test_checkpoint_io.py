"""A checkpoint that is not written whole leaves the one from before."""

import os
import zipfile

import pytest
import torch

from qat.errors import CheckpointError
from qat.training.checkpoint_io import WholeCheckpoints, read_checkpoint, read_settings


def checkpoint(value):
    return {"hyper_parameters": {"config": {"seed": value}}, "x": torch.full((100,), value)}


@pytest.fixture
def last(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint(checkpoint(1), path)
    return path


def test_a_checkpoint_is_replaced_and_alone(last):
    inode = last.stat().st_ino
    WholeCheckpoints().save_checkpoint(checkpoint(2), last)
    assert read_settings(last) == {"seed": 2}
    assert WholeCheckpoints().load_checkpoint(last)["x"].equal(torch.full((100,), 2))
    assert last.stat().st_ino != inode
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]


def full(_):
    raise OSError(28, "No space left on device")


def break_a_bit(self):
    return "archive/data.pkl"


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [(os, "fsync", full), (zipfile.ZipFile, "testzip", break_a_bit)],
    ids=["full", "reads back otherwise"],
)
def test_a_failed_write_keeps_the_last_good_one(place, name, fault, last, monkeypatch):
    monkeypatch.setattr(place, name, fault)
    with pytest.raises(OSError, match=r"space|reads back"):
        WholeCheckpoints().save_checkpoint(checkpoint(2), last)
    assert read_settings(last) == {"seed": 1}
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]


def test_a_bit_that_flips_on_the_disk_is_noticed(last, monkeypatch):
    """What is read back is the file, not what was to be written."""
    good = last.read_bytes()

    class Flipping(zipfile.ZipFile):
        def __init__(self, path):
            with open(path, "r+b") as stream:  # noqa: PTH123
                stream.seek(len(good) // 2)
                stream.write(b"\xff" * 40)
            super().__init__(path)

    monkeypatch.setattr("qat.training.checkpoint_io.zipfile.ZipFile", Flipping)
    with pytest.raises((OSError, zipfile.BadZipFile)):
        WholeCheckpoints().save_checkpoint(checkpoint(2), last)
    assert last.read_bytes() == good


def test_other_content_is_a_sentence(tmp_path):
    torch.save([1], tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"other content in .*a\.ckpt"):
        read_checkpoint(tmp_path / "a.ckpt")
