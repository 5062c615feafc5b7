import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.datasets import ImageFolder

from qat.data import FolderData
from qat.data.folder import read_image
from qat.data.listing import list_folder
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


def test_mean_and_std_of_a_foreign_checkpoint(root: Path) -> None:
    def images(**statistics: list[float]) -> torch.Tensor:
        data = FolderData(root, size=12, batch_size=8, **statistics)
        data.setup()
        assert data._train is not None
        random, _ = data._train.__getitems__([(0, i) for i in range(len(data._train))])
        return torch.cat([next(iter(data.test_dataloader()))[0], random])

    pixels, mean, std = images(mean=[0, 0, 0], std=[1, 1, 1]), [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(images(mean=mean, std=std), expected)
    for wrong in ({"mean": [0.5]}, {"std": [1, 0, 1]}, {"mean": 0.5}):
        with pytest.raises(ConfigError, match=rf"data\.{next(iter(wrong))} to"):
            FolderData(root, **wrong)


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


WRONG = {
    "pipe": (lambda f: os.mkfifo(f / "a.jpg"), r"image file at '.*a\.jpg', got: a pipe; remove it"),
    "dead link": (lambda f: (f / "a.png").symlink_to("no"), r"'.*a\.png', got: nothing"),
    "own link": (lambda f: (f / "a.png").symlink_to("a.png"), r"'.*a\.png', got: Too many levels"),
    "circle": (lambda f: (f / "loop").symlink_to(".."), r"each folder of images once, got '.*loop"),
    "newline": (lambda f: f.rename(f.with_name("r\nd")), r"characters that print, got 'r\\nd'"),
    "surrogate": (lambda f: f.rename(f.with_name("r\udcff")), r"print, got 'r\\udcff'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_image_is_named_before_anything_is_opened(
    root: Path, change: Callable[[Path], object], message: str
) -> None:
    for part in ("train", "val"):
        change(root / part / "red")
    with pytest.raises(DataError, match=message):
        FolderData(root, size=8).setup()


def test_order_is_that_of_torchvision(root: Path) -> None:
    (root / "train" / "red" / "b" / "c").mkdir(parents=True)
    for name in ("red/b/c/1.png", "red/b/2.JPG", "red/b-3.png", "blue/B.png", "blue/notes.txt"):
        (root / "train" / name).touch()
    (root / "train" / "red" / "b").rename(root / "train" / "red" / "B")
    expected = ImageFolder(str(root / "train"))
    assert list_folder(root / "train") == (expected.classes, expected.samples)


def test_hidden_folders_are_no_classes(root: Path) -> None:
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data = FolderData(root, size=8)
    data.setup()
    assert data.class_names == ["blue", "red"]


def test_images_that_would_be_read_wrongly_or_take_all_memory(root: Path) -> None:
    path = root / "val" / "red" / "2.jpg"
    deep = Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16))
    for image, kind, message in (
        (deep, "PNG", r"8 bits a channel .* got mode I;16"),
        (Image.new("F", (9, 9)), "TIFF", r"8 bits a channel .* got mode F"),
        (Image.new("1", (3_000_000, 1)), "PNG", r"less narrow than 3000000 x 1 pixels at .*2\.jpg"),
    ):
        image.save(path, kind)
        with pytest.raises(DataError, match=message):
            list(FolderData(root, size=8).test_dataloader())


def test_a_decompression_bomb_is_refused_by_its_header(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # these have 600
    with pytest.raises(DataError, match=r"readable image at .*0\.jpg.*decompression bomb"):
        list(FolderData(root, size=8).test_dataloader())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # a warning, which is nobody's business
    assert len(list(FolderData(root, size=8).test_dataloader())) == 1


def test_size_out_of_range(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.size .* at least 1, got 0"):
        FolderData(root, size=0)


def test_no_other_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow decodes EPS by running Ghostscript, whatever the suffix of the file says."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **_: started.append(args))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(str(tmp_path / "a.png"))
    assert not started
