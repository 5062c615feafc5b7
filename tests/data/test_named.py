"""Several inputs in one file: each comes to the model under its own name, as it is stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.calls import Call
from qat.data import ArraysData
from qat.errors import DataError


def content(**changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    arrays = {
        "x_train/ids": random.integers(0, 9, (20, 4), dtype=np.int32),
        "x_train/mask": random.random((20, 4)) < 0.5,
        "x_train/scale": random.random(20),
        "y_train": np.arange(20) % 3,
        "x_test/ids": random.integers(0, 9, (6, 4), dtype=np.int32),
        "x_test/mask": random.random((6, 4)) < 0.5,
        "x_test/scale": random.random(6),
        "y_test": np.arange(6) % 3,
    }
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def make(path: Path, arrays: dict[str, Any], **settings: Any) -> ArraysData:
    np.savez(path / "a.npz", **arrays)
    data = ArraysData(path / "a.npz", **{"augment": "none", "batch_size": 5, **settings})
    data.setup()
    return data


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_hold_every_input_by_name(tmp_path, num_workers):
    arrays = content()
    data = make(tmp_path, arrays, num_workers=num_workers)
    batches = list(data.test_dataloader())
    x = {name: torch.cat([x[name] for x, _ in batches]) for name in batches[0][0]}
    assert [(name, values.dtype) for name, values in x.items()] == [
        ("ids", torch.int64),
        ("mask", torch.bool),
        ("scale", torch.float32),
    ]
    for name, values in x.items():
        expected = torch.from_numpy(arrays[f"x_test/{name}"]).to(values.dtype)
        assert torch.equal(values, expected)
    assert data.num_classes == 3
    assert data.input_shape == (9,)
    assert [len(x["ids"]) for x, _ in data.train_dataloader()] == [5, 5, 5]
    (calibration,) = data.calibration_batches(1)
    assert isinstance(calibration, Call)
    assert [tuple(x.shape) for x in calibration.tensors] == [(5, 4), (5, 4), (5,)]


@pytest.mark.parametrize(
    ("changes", "settings", "match"),
    [
        ({"x_test/ids": None}, {}, r"x_test/NAME of .* to be like x_train/NAME.*prepare both"),
        ({"x_test/ids": np.zeros((6, 5), np.int32)}, {}, r"ids torch.int64 \(5,\)"),
        ({"x_test/ids": np.zeros((6, 4))}, {}, r"ids torch.float32 \(4,\)"),
        ({"x_train/scale": np.zeros(19)}, {}, "as many samples in every input.*scale 19"),
        ({"x_train/scale": np.full(20, np.nan)}, {}, "expected finite values in x_train/scale"),
        ({"x_train/mask": np.full((20, 4), "a")}, {}, "x_train/mask of .*convert it"),
        ({"y_train": np.arange(19) % 3}, {}, "x_train has 20 samples and y_train 19 labels"),
        ({"y_test": None}, {}, "y_test is missing"),
        ({}, {"augment": "crop"}, "expected data.augment=none"),
        ({}, {"mean": [0.5]}, "no data.mean or data.std"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, settings, match):
    with pytest.raises(DataError, match=match):
        make(tmp_path, content(**changes), **settings)
