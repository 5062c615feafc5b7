import pytest
import torch

from qat.data import DigitsData
from qat.data.digits import read_digits
from qat.errors import ConfigError, DataError


def test_split_and_normalisation() -> None:
    data = DigitsData(channels=1, val_fraction=0, augment="none")
    data.setup()
    assert data._train is not None
    assert (len(data._train), len(data._test)) == (1297, 500)
    x = data._train.__getitems__([(0, i) for i in range(1297)])[0]
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3
    plain = DigitsData(channels=1, augment="none", mean=[0], std=[1])
    plain.setup()
    pixels = next(iter(plain.test_dataloader()))[0]
    assert (pixels * 16 == (pixels * 16).round()).all()
    assert (plain.mean, plain.std) == ((0.0,), (1.0,))
    other = DigitsData(channels=1, augment="none", seed=5)
    assert torch.equal(
        next(iter(other.test_dataloader()))[0], next(iter(data.test_dataloader()))[0]
    )


def test_enlarged_and_repeated() -> None:
    data = DigitsData(size=32)
    data.setup()
    assert data.input_shape == (3, 32, 32)
    x = next(iter(data.train_dataloader()))[0]
    assert torch.equal(x[:, 0], x[:, 2])
    assert read_digits(8, 1)[0].unique().numel() == 17


def test_images_larger_than_memory() -> None:
    with pytest.raises(DataError, match=r"1797 digits of 3 x 100000 x 100000 .*lower data\.size"):
        DigitsData(size=10**5).setup()


def test_arguments_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"data\.channels .* at least 1, got 0"):
        DigitsData(channels=0)
    with pytest.raises(ConfigError, match="got 'rotate'"):
        DigitsData(augment="rotate")
    with pytest.raises(ConfigError, match=r"data\.std to have 3 values, .*got \[1, 1\]"):
        DigitsData(std=[1, 1])
