"""Archives of arrays that lie about themselves: refused by their headers, nothing is allocated."""

import zipfile

import numpy as np
import pytest

from qat.data.npz import read_npz
from qat.errors import DataError
from tests.campaigns.data_sets import arrays, sets

KINDS = [
    "shape lies",
    "shape overflows",
    "shape negative",
    "type of objects",
    "type of 2 GB",
    "header calls",
    "header deep",
    "bomb",
    "encrypted",
    "twice",
    "pipe",
    "device",
    "link to itself",
    "name with NUL",
    "npy",
]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_archive(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = sets()[f"npz: {kind}"][1](tmp_path)["path"]
    with pytest.raises(DataError) as caught:
        read_npz(tmp_path / path, list(arrays()), [])
    message = str(caught.value)
    assert message.startswith("expected")
    assert message.isprintable()
    assert "npz" in message or "a\\x00b" in message
    assert not (tmp_path / "code-was-run").exists()


def test_only_what_is_asked_for_is_read(tmp_path):
    np.savez(path := tmp_path / "a.npz", x=np.arange(3), objects=np.array([None]))
    assert list(read_npz(path, ["x"], ["names"])) == ["x"]
    with pytest.raises(DataError, match=r"plain numbers in objects .*Python objects"):
        read_npz(path, ["objects"], [])


def test_a_flipped_bit_is_noticed(tmp_path):
    np.savez(path := tmp_path / "a.npz", **arrays())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("x_train.npy").header_offset + 1000
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        read_npz(path, list(arrays()), [])
