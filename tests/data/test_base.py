"""What every data module promises, tried on all that need no download."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data import ArraysData, DataModule, DigitsData, FolderData, TabularData, TextData
from qat.data.base import MONITOR_SAMPLES
from qat.data.tensors import TensorSource
from qat.errors import ConfigError, DataError

Make = Callable[..., DataModule]


def arrays(path: Path, **kwargs: Any) -> DataModule:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    y = np.arange(60) % 5
    np.savez(path / "a.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    return ArraysData(path / "a.npz", **kwargs)


def folder(path: Path, **kwargs: Any) -> DataModule:
    random = np.random.default_rng(0)
    for part, number in (("train", 20), ("val", 5)):
        for label in ("cat", "dog"):
            (path / part / label).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / part / label / f"{i}.png")
    return FolderData(path, size=16, **kwargs)


def text(path: Path, **kwargs: Any) -> DataModule:
    random = np.random.default_rng(0)
    for number in range(12):
        (path / f"{number}.txt").write_bytes(random.bytes(200))
    return TextData(path, "*.txt", context=16, num_train=60, num_test=10, **kwargs)


@pytest.fixture(params=["arrays", "digits", "folder", "tabular", "text"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    makers: dict[str, Make] = {
        "arrays": partial(arrays, tmp_path),
        "digits": DigitsData,
        "folder": partial(folder, tmp_path),
        "tabular": partial(TabularData, num_samples=200),
        "text": partial(text, tmp_path),
    }
    return makers[request.param]


def read(data: DataModule, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.order.set_epoch(epoch)
    return list(loader)


def identical(a: list, b: list) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in pairs)


def test_batches_and_description(make: Make) -> None:
    data = make(batch_size=8)
    data.setup()
    x, y = next(iter(data.train_dataloader()))
    assert x.dtype == (torch.int64 if isinstance(data, TextData) else torch.float32)
    assert y.dtype == torch.int64
    assert x.shape == (8, *data.input_shape)
    assert x.is_contiguous()
    assert len(data.class_names) == data.num_classes
    assert int(y.max()) < data.num_classes
    if data.mean is not None:
        assert len(data.mean) == len(data.std or ()) == x.shape[1]


def test_training_is_a_function_of_seed_and_epoch(make: Make) -> None:
    first = read(make(batch_size=8), epoch=3)
    torch.manual_seed(99)  # The global generator neither matters ...
    state = torch.get_rng_state()
    assert identical(read(make(batch_size=8), epoch=3), first)
    assert identical(read(make(batch_size=8, num_workers=2), epoch=3), first)
    assert torch.equal(torch.get_rng_state(), state)  # ... nor moves.
    assert not identical(read(make(batch_size=8), epoch=4), first)
    assert not identical(read(make(batch_size=8, seed=1), epoch=3), first)


def test_augmentation_belongs_to_the_sample_and_not_to_the_batch(make: Make) -> None:
    one, two = make(batch_size=8), make(batch_size=4)
    a = torch.cat([x for x, _ in read(one, epoch=2)])
    b = torch.cat([x for x, _ in read(two, epoch=2)])
    assert torch.equal(a[:24], b[:24])


def test_validation_and_test_come_whole_and_in_order(make: Make) -> None:
    data = make(batch_size=8, val_fraction=0.25)
    data.setup()
    assert data._train is not None
    train, val = data._train.indices, data._val.indices
    assert not set(train) & set(val)
    assert sorted(train + val) == list(range(len(train) + len(val)))
    assert len(val) == round(0.25 * (len(train) + len(val)))
    for loader, size in (
        (data.val_dataloader(), len(val)),
        (data.test_dataloader(), len(data._test)),
    ):
        assert sum(len(y) for _, y in loader) == size
        assert identical(list(loader), list(loader))


def test_no_validation_split_trains_on_everything(make: Make) -> None:
    data = make(batch_size=8, val_fraction=0)
    data.setup()
    assert data._train is not None
    assert len(data._train) >= len(data._val)
    assert len(data._val) == min(MONITOR_SAMPLES, len(data._train))


def test_validation_shares_memory_with_training() -> None:
    data = DigitsData()
    data.setup()
    assert data._train is not None
    train, val = data._train.source, data._val.source
    assert isinstance(train, TensorSource)
    assert isinstance(val, TensorSource)
    assert train.x is val.x


def test_calibration_is_plain_training_data(make: Make) -> None:
    data = make(batch_size=8)
    batches = data.calibration_batches(3)
    assert [b.shape for b in batches] == [(8, *data.input_shape)] * 3
    read(data, epoch=5)
    assert all(map(torch.equal, batches, data.calibration_batches(3)))
    assert data._train is not None
    plain = data._train.plain()
    known = plain.__getitems__([(0, i) for i in range(len(plain))])[0]
    assert all((known == x).flatten(1).all(1).any() for x in batches[0])
    assert len(data.calibration_batches(10_000)) == len(plain) // 8


def test_every_training_input_comes_once_in_order_in_full_batches(make: Make) -> None:
    data = make(batch_size=8)
    x = torch.cat(list(data.training_inputs()))
    assert data._train is not None
    count = len(data._train)
    known, _ = data._train.__getitems__([(0, i) for i in range(count)])
    assert len(x) == -(-count // 8) * 8
    assert torch.equal(x, known[torch.arange(len(x)) % count])


def test_random_says_whether_inputs_differ_between_epochs(make: Make) -> None:
    data = make(batch_size=8)
    data.setup()
    assert data._train is not None
    assert data.is_random is data._train.is_random
    for view in (data._train, data._train.plain()):
        places = range(len(view))
        a, b = (view.__getitems__([(epoch, i) for i in places])[0] for epoch in (0, 1))
        assert view.is_random is not torch.equal(a, b)


def test_setup_twice_keeps_everything(make: Make) -> None:
    data = make()
    data.setup("fit")
    train = data._train
    data.setup("test")
    assert data._train is train


def test_fewer_samples_than_a_batch() -> None:
    data = TabularData(num_samples=20, batch_size=100)
    assert [len(y) for _, y in data.train_dataloader()] == [14]
    assert [len(x) for x in data.calibration_batches(2)] == [14]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size .* at least 1, got 0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction to be at least 0 and below 1, got 1\.0"),
        ({"val_fraction": -0.1}, r"data\.val_fraction .* got -0\.1"),
        ({"val_fraction": float("nan")}, r"data\.val_fraction .* got nan"),
        ({"batch_size": 16.5}, r"data\.batch_size to be a whole number .* got 16\.5"),
        ({"batch_size": True}, r"data\.batch_size .* got True"),
        ({"num_workers": -1}, r"data\.num_workers .* at least 0 .* got -1"),
        ({"num_workers": 1000}, r"data\.num_workers .* at most 256, got 1000"),
        ({"device": "meta"}, r"data\.device .* got 'meta'"),
        ({"device": 5}, r"data\.device .* got 5"),
    ],
)
def test_arguments_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TabularData(**kwargs)
    with pytest.raises(ConfigError, match="at least 1 calibration batch, got 0"):
        TabularData().calibration_batches(0)


def test_resume_without_a_trainer() -> None:
    first = TabularData(batch_size=8).train_dataloader()
    first.order.set_epoch(2)
    batches = list(first)
    reading = iter(first)
    for _ in range(5):
        next(reading)
    second = TabularData(batch_size=8).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert len(second) == len(batches)
    assert identical(list(second), batches[5:])
    assert identical(list(second), batches)


@pytest.mark.parametrize(
    ("changed", "key"), [({"batch_size": 16}, "batch_size"), ({"seed": 1}, "seed")]
)
def test_resume_with_other_settings(changed: dict[str, int], key: str) -> None:
    state = TabularData(batch_size=8).train_dataloader().state_dict()
    loader = TabularData(**{"batch_size": 8, **changed}).train_dataloader()
    with pytest.raises(
        DataError, match=rf"resume with {key} \d+ of the checkpoint, but .* {key} \d+"
    ):
        loader.load_state_dict(state)
