import hashlib
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, cifar

from qat.data import Cifar10Data
from qat.data.source import IMAGENET_MEAN
from qat.errors import ConfigError, DataError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write pickles in the original format, ten images each, and tell torchvision their sums."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def dump(name: str, content: object) -> str:
        (folder / name).write_bytes(data := pickle.dumps(content))
        return hashlib.md5(data).hexdigest()

    def batch() -> dict[str, object]:
        pixels = random.integers(0, 256, (10, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": list(range(10))}

    parts = [[name, dump(name, batch())] for name, _ in CIFAR10.train_list]
    monkeypatch.setattr(CIFAR10, "train_list", parts)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", dump("test_batch", batch())]])
    meta = {**CIFAR10.meta, "md5": dump("batches.meta", {"label_names": NAMES})}
    monkeypatch.setattr(CIFAR10, "meta", meta)


def test_original_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path, monkeypatch)
    data = Cifar10Data(tmp_path, batch_size=5, val_fraction=0.2)
    data.prepare_data()
    data.setup()
    assert data.class_names == NAMES
    assert data.input_shape == (3, 32, 32)
    assert sum(len(y) for _, y in data.train_dataloader()) == 40
    assert sum(len(y) for _, y in data.test_dataloader()) == 10
    assert data.mean == IMAGENET_MEAN
    plain = Cifar10Data(tmp_path, mean=[0, 0, 0], std=[1, 1, 1])
    plain.setup()
    pixels = next(iter(plain.test_dataloader()))[0] * 255
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-4)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    message = r"CIFAR-10 in .* and URLError .*no route to host.*use data=arrays"
    with pytest.raises(DataError, match=message):
        Cifar10Data(tmp_path).prepare_data()
    with pytest.raises(DataError, match=message):
        Cifar10Data(tmp_path).setup()


def test_another_pickle_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path, monkeypatch)
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    batch = tmp_path / CIFAR10.base_folder / "data_batch_2"
    batch.write_bytes(b"cos\nsystem\n(S'touch code-was-run'\ntR.")
    with pytest.raises(DataError, match=r"CIFAR-10 in .*missing or damaged"):
        Cifar10Data(tmp_path).setup()
    assert not (tmp_path / "code-was-run").exists()
    batch.unlink()
    os.mkfifo(batch)
    with pytest.raises(DataError, match=r"data_batch_2, got: a pipe; remove it"):
        Cifar10Data(tmp_path).setup()


def test_unknown_augmentation() -> None:
    with pytest.raises(ConfigError, match="got 'flip'"):
        Cifar10Data(augment="flip")
    with pytest.raises(ConfigError, match=r"data\.mean to have 3 values, .*got \[0\.5\]"):
        Cifar10Data(mean=[0.5])
