"""Peers train the same checkpoint: a row comes out, and mistakes end in a sentence."""

import json

import numpy as np
import pytest
import torch

from qat.models import build


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        f"{name}_{part}": values
        for part, size in (("train", 32), ("test", 16))
        for name, values in (
            ("x", generator.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)),
            ("y", np.arange(size) % 10),
        )
    }
    np.savez(tmp_path / "data.npz", **arrays)
    torch.save(build("resnet20", 10).state_dict(), tmp_path / "float.pt")
    return tmp_path


def arguments(files, data="data.npz"):
    return ["--data", files / data, "--ckpt", files / "float.pt", "--epochs", "1"]


def test_a_row_of_plain_lsq(files, call):
    row = files / "row.json"
    more = ["--bits", "4", "8", "--batch-size", "16", "--json", row]
    status, _, error = call("peers", "lsq", *arguments(files), *more)
    assert (status, error) == (0, "")
    found = json.loads(row.read_text())
    assert (found["method"], found["bits"], found["epochs"]) == ("lsq", "w4a8", 1)
    assert 0 <= found["fake_quant"] <= 100


def test_a_missing_file_is_named(files, call):
    status, _, error = call("peers", "lsq", *arguments(files, "none.npz"))
    assert status == 1
    assert "none.npz" in error
