from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.data import ArraysData
from qat.data.source import IMAGENET_MEAN, IMAGENET_STD
from qat.errors import ConfigError, DataError

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10.npz"


def content(**changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(20) % 10,
        "x_test": random.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(10),
    }
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def make(path: Path, arrays: dict[str, Any], **kwargs: Any) -> ArraysData:
    np.savez(path / "a.npz", **arrays)
    data = ArraysData(path / "a.npz", **kwargs)
    data.setup()
    return data


def test_images(tmp_path: Path) -> None:
    arrays = content()
    data = make(tmp_path, arrays)
    assert data.input_shape == (3, 8, 8)
    assert data.class_names == [str(i) for i in range(10)]
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    [(x, y)] = data.test_dataloader()
    expected = (arrays["x_test"] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    torch.testing.assert_close(x, torch.tensor(expected.transpose(0, 3, 1, 2)).float())
    assert y.tolist() == arrays["y_test"].tolist()


def test_grey_images_and_names(tmp_path: Path) -> None:
    grey = {"x_train": content()["x_train"][..., :1], "x_test": content()["x_test"][..., :1]}
    names = [f"class {i}" for i in range(12)]
    data = make(tmp_path, content(**grey, class_names=np.array(names)))
    assert data.class_names == names
    assert data.num_classes == 12
    assert data.mean is None
    x = next(iter(data.test_dataloader()))[0]
    assert x.shape[1:] == (1, 8, 8)
    assert 0 <= x.min() < x.max() <= 1


def test_features_pass_through(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(30, 6))
    data = make(tmp_path, content(x_train=x[:20], x_test=x[20:]), augment="none")
    assert data.input_shape == (6,)
    assert torch.equal(next(iter(data.test_dataloader()))[0], torch.tensor(x[20:]).float())


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "key": ({"y_test": None}, {}, r"but y_test is missing \(found: x_train, y_train, x_test\)"),
    "dtype": (
        {"x_test": np.zeros((10, 8, 8, 3), int)},
        {},
        r"x_test of .* but it is int64 of shape",
    ),
    "rank": (
        {"x_train": np.zeros((20, 8), np.uint8)},
        {},
        r"uint8 images .* is uint8 of shape \(20, 8\)",
    ),
    "labels": (
        {"y_test": np.zeros(10)},
        {},
        r"y_test of .* whole numbers .* it is float64 of shape",
    ),
    "length": (
        {"y_train": np.arange(19) % 10},
        {},
        r"x_train has 20 samples and y_train 19 labels",
    ),
    "shape": (
        {"x_test": np.zeros((10, 9, 8, 3), np.uint8)},
        {},
        r"x_test .* like x_train.*\(3, 9, 8\)",
    ),
    "classes": ({"y_test": np.zeros(10, int)}, {}, r"y_train has 10 and y_test has 1; correct"),
    "negative": (
        {"y_train": np.arange(20) % 10 - (np.arange(20) == 0)},
        {},
        r"y_train .* from -1 to 9",
    ),
    "names": ({"class_names": np.array(["a", "b"])}, {}, r"labels 0 to 1 in y_train .* found 2 \("),
    "nan": (
        {"x_train": np.full((20, 2), np.nan), "x_test": np.zeros((10, 2))},
        {"augment": "none"},
        r"finite values in x_train of .*a\.npz, but 40 of 40",
    ),
    "augment": (
        {"x_train": np.zeros((20, 2)), "x_test": np.zeros((10, 2))},
        {},
        r"for data\.augment=crop_flip, but x_train .* \(2,\); set data\.augment=none",
    ),
    "gap": (
        {"y_train": np.array([*range(9), 500] * 2), "y_test": np.array([*range(9), 500])},
        {},
        r"numbered 0, 1, .* highest label is 500 with 20 samples",
    ),
    "huge": (
        {"y_train": np.full(20, 2**62)},
        {},
        r"labels from 0 in y_train .* 4611686018427387904",
    ),
    "one class": (
        {"y_train": np.zeros(20, int), "y_test": np.zeros(10, int)},
        {},
        r"2 or more classes.* got 1 classes",
    ),
    "no channels": (
        {"x_train": np.zeros((20, 8, 8, 0), np.uint8), "x_test": np.zeros((10, 8, 8, 0), np.uint8)},
        {},
        r"inputs that are not empty.* shape \(0, 8, 8\)",
    ),
    "channels first": (
        {"x_train": np.zeros((20, 3, 8, 8), np.uint8)},
        {},
        r"channels last, but .* \(20, 3, 8, 8\); turn it",
    ),
    "too large": (
        {"x_train": np.full((20, 2), 1e300), "x_test": np.zeros((10, 2))},
        {"augment": "none"},
        r"finite values in x_train of .* 40 of 40",
    ),
    "name twice": ({"class_names": np.array(["a"] * 10)}, {}, r"names that differ, got 'a' twice"),
    "name prints": (
        {"class_names": np.array(["\x1b[31m", *"abcdefghi"])},
        {},
        r"characters that print, got '\\x1b\[31m'",
    ),
    "names objects": (
        {"class_names": np.array([None] * 10)},
        {},
        r"plain numbers in class_names .* Python objects",
    ),
    "mean": ({}, {"mean": (0.5,)}, r"data\.mean to have 3 values.* got \[0\.5\]"),
    "object": (
        {"x_train": np.array([None, "a"])},
        {},
        r"plain numbers in x_train of .* Python objects, which could run any code",
    ),
}


@pytest.mark.parametrize(("changes", "kwargs", "message"), WRONG.values(), ids=WRONG.keys())
def test_malformed_arrays(
    tmp_path: Path, changes: dict[str, Any], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(tmp_path, content(**changes), **kwargs)


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble, ">f4", ">f8"])
def test_every_kind_of_float_passes(tmp_path: Path, dtype: Any) -> None:
    x = np.random.default_rng(0).normal(size=(30, 6)).astype(dtype)
    data = make(tmp_path, content(x_train=x[:20], x_test=x[20:]), augment="none")
    seen = next(iter(data.test_dataloader()))[0]
    assert torch.equal(seen, torch.tensor(x[20:].astype(np.float32)))


def test_names_as_bytes_and_numbers(tmp_path: Path) -> None:
    names = np.array([f"é{i}".encode() for i in range(10)])
    assert make(tmp_path, content(class_names=names)).class_names == [f"é{i}" for i in range(10)]
    assert make(tmp_path, content(class_names=np.arange(10))).class_names[9] == "9"


@pytest.mark.parametrize(
    "wrong",
    [{"path": 5}, {"path": ""}, {"mean": 0.5}, {"mean": [float("nan")]}, {"std": [1, 0, 1]}],
)
def test_values_of_another_kind(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(wrong))} to be .* got"):
        ArraysData(**{"path": "a.npz", **wrong})


def test_malformed_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match=r"an \.npz file at .*a\.npz, got: nothing"):
        ArraysData(path).setup()
    np.savez_compressed(path, **content())
    half = path.read_bytes()[:500]
    np.save(tmp_path / "b.npy", np.zeros(3))
    for broken in (b"garbage", b"", half, (tmp_path / "b.npy").read_bytes()):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"cannot be read as \.npz .*numpy\.savez"):
            ArraysData(path).setup()


def test_unknown_augmentation() -> None:
    with pytest.raises(ConfigError, match="got 'flip'"):
        ArraysData("a.npz", augment="flip")


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no {CIFAR}")
def test_cifar10() -> None:
    data = ArraysData(CIFAR, batch_size=500)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (500, 3, 32, 32)
    assert set(y.tolist()) == set(range(10))
    assert abs(float(torch.stack(data.calibration_batches(4)).mean())) < 0.2
