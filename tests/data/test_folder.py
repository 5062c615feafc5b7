from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from qat.data import FolderData
from qat.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for label, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (30, 20), colour).save(tmp_path / part / label / f"{i}.jpg")
    return tmp_path


def test_colours_and_classes(root: Path) -> None:
    data = FolderData(root, size=12, batch_size=8)
    data.setup()
    assert data.class_names == ["blue", "red"]
    assert data.input_shape == (3, 12, 12)
    [(x, y)] = data.test_dataloader()
    assert x.shape == (8, 3, 12, 12)
    assert ((x[:, 0] > x[:, 2]).flatten(1).all(1) == (y == 1)).all()


def test_part_named_test(root: Path) -> None:
    (root / "val").rename(root / "test")
    assert sum(len(y) for _, y in FolderData(root, size=8).test_dataloader()) == 8


def test_missing_and_empty_folders(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/train to hold one sub-folder .* data\.root"):
        FolderData(tmp_path / "nowhere").setup()
    (root / "train" / "green").mkdir()
    with pytest.raises(DataError, match=r"train to hold one sub-folder of images .*green"):
        FolderData(root).setup()


def test_classes_that_differ(root: Path) -> None:
    (root / "val" / "red").rename(root / "val" / "rot")
    with pytest.raises(
        DataError, match=r"same classes in .*train and .*val, but red, rot \(2 in all\)"
    ):
        FolderData(root).setup()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image(root: Path, num_workers: int, content: bytes | None) -> None:
    path = root / "val" / "red" / "2.jpg"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    loader = FolderData(root, size=8, num_workers=num_workers).test_dataloader()
    with pytest.raises(DataError, match=r"readable image at .*val/red/2\.jpg, but it cannot"):
        list(loader)
    if isinstance(reading := loader._iterator, _MultiProcessingDataLoaderIter):
        reading._shutdown_workers()  # Now; garbage collection would wait for five seconds.


def test_size_out_of_range(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.size .* at least 1, got 0"):
        FolderData(root, size=0)
