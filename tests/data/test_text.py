import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.data import TextData
from qat.data.text import TextSource, byte_name, find_files
from qat.errors import ConfigError, DataError


def source(length: int, context: int, num_samples: int) -> TextSource:
    return TextSource(torch.arange(length).to(torch.uint8), context, num_samples, seed=3)


def write(folder: Path, count: int = 12, size: int = 100) -> Path:
    for i in range(count):
        (folder / f"{i:02}.txt").write_bytes(bytes([65 + i]) * size)
    return folder


def test_labels_are_the_next_bytes() -> None:
    x, y = source(200, 8, 5).__getitems__([(4, 0), (4, 3)])
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (2, 8)
    assert torch.equal(y, x + 1)  # the text counts upwards


def test_a_sample_never_leaves_its_stretch() -> None:
    text = source(200, 8, 5)  # stretches of 40 bytes
    starts = torch.stack([text.table(epoch) for epoch in range(300)])
    assert (starts.min(), starts.max()) == (0, 40 - 8 - 1)
    for epoch in range(20):
        x, y = text.__getitems__([(epoch, i) for i in range(5)])
        stretch = torch.arange(5)[:, None]
        assert torch.equal(x // 40, stretch.expand_as(x))
        assert torch.equal(y // 40, stretch.expand_as(y))


def test_plain_windows_stay() -> None:
    plain = source(200, 8, 5).plain()
    x, _ = plain.__getitems__([(7, 1), (7, 2)])
    assert torch.equal(x[:, 0], torch.tensor([40, 80]))


def test_windows_as_long_as_their_stretches_cannot_move() -> None:
    text = source(45, 8, 100)
    assert not text.table(3).any()
    assert not text.is_random
    assert source(200, 8, 5).is_random


def test_as_many_samples_as_have_a_window() -> None:
    assert len(source(45, 8, 100)) == 5
    assert len(source(9, 8, 100)) == 1


def test_every_tenth_file_is_for_the_test(tmp_path: Path) -> None:
    data = TextData(write(tmp_path), "*.txt", context=10, batch_size=4, val_fraction=0)
    data.setup()
    tested = torch.cat([x for x, _ in data.test_dataloader()]).unique()
    trained = torch.cat([x for x, _ in data.train_dataloader()]).unique()
    assert tested.tolist() == [65, 75]  # the first and the eleventh
    assert set(trained.tolist()) == set(range(65, 77)) - {65, 75}
    assert (data.num_classes, data.input_shape, data.mean, data.std) == (256, (10,), None, None)


def test_the_numbers_of_samples_are_caps(tmp_path: Path) -> None:
    data = TextData(write(tmp_path), "*.txt", context=10, num_train=20, num_test=3, val_fraction=0)
    data.setup()
    assert len(data.val_dataloader().dataset) == 20  # pyright: ignore[reportArgumentType]
    assert sum(len(x) for x, _ in data.test_dataloader()) == 3


def test_the_standard_library_is_there_without_its_tests() -> None:
    files = find_files(None, "**/*.py")
    assert len(files) > 300
    assert {"abc.py", "typing.py"} <= {path.name for path in files}
    assert not any({"test", "site-packages"} & set(path.parts) for path in files)


def test_names_of_bytes_differ() -> None:
    names = [byte_name(byte) for byte in range(256)]
    assert len(set(names)) == 256
    assert (names[65], names[10]) == ("A", "\\x0a")


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"two files or more like '\*\.md'.*got 0.*data\.pattern"):
        TextData(write(tmp_path), "*.md").setup()


@pytest.mark.parametrize("size", [0, 4])
def test_too_little_text(size: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"64 bytes in the training text, got {size}: add files"):
        TextData(write(tmp_path, 2, size), "*.txt").setup()


@pytest.mark.parametrize("wrong", [{"context": 0}, {"num_train": 1}, {"num_test": 0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(wrong))} "):
        TextData(**wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (os.mkfifo, r"a file at '.*9\.txt', got: a pipe; remove it"),
        (lambda path: path.symlink_to("/dev/zero"), r"got: a device"),
        (lambda path: path.symlink_to("9.txt"), r"got: Too many levels"),
        (
            lambda path: [path.touch(), os.truncate(path, 2**42)],
            r"the text to fit .* 8796\.1 GB",
        ),
    ],
)
def test_files_that_would_never_end(tmp_path: Path, change: Any, message: str) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(b"some words\n" * 20)
    change(tmp_path / "9.txt")
    with pytest.raises(DataError, match=message):
        TextData(tmp_path, "*.txt", context=8).setup()


@pytest.mark.parametrize("pattern", ["/etc/*", "***"])
def test_pattern_that_is_none(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.pattern to be a glob below data\.root"):
        TextData(tmp_path, pattern).setup()
