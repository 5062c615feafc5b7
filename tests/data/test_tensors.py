import pytest
import torch

from qat.data.augment import CropFlip, check_augment
from qat.data.tensors import TensorSource, check_finite, check_labels
from qat.errors import ConfigError, DataError


def test_crop_and_flip_equal_the_slow_way() -> None:
    x = torch.randint(1, 256, (50, 3, 6, 5), dtype=torch.uint8)
    augment = CropFlip(50, padding=2, flip=True, seed=0)
    index = torch.randperm(50)[:20]
    out = augment(x[index], 4, index)
    assert out.dtype == torch.uint8
    for image, i in zip(out, index, strict=True):
        top, left, mirrored = augment.table(4)[i].tolist()
        padded = torch.zeros(3, 10, 9, dtype=torch.uint8)
        padded[:, 2:8, 2:7] = x[i]
        window = padded[:, top : top + 6, left : left + 5]
        assert torch.equal(image, window.flip(-1) if mirrored else window)


def test_choices_cover_their_range() -> None:
    table = CropFlip(2000, padding=4, flip=True, seed=0).table(0)
    assert table[:, :2].unique().tolist() == list(range(9))
    assert 0.45 < table[:, 2].float().mean() < 0.55
    assert not CropFlip(2000, padding=4, flip=False, seed=0).table(0)[:, 2].any()


def test_bytes_are_scaled_and_normalised_and_black_is_black() -> None:
    x = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    source = TensorSource(x, torch.zeros(8), mean, std, CropFlip(8, padding=4, flip=False, seed=0))
    expected = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    pairs = [(0, i) for i in range(8)]
    torch.testing.assert_close(source.plain().__getitems__(pairs)[0], expected)
    black = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    shifted = source.__getitems__(pairs)[0]
    is_black = torch.isclose(shifted, black.view(3, 1, 1)).all(1)
    moved = (source.augment.table(0)[:, :2] - 4).abs().amax(1) == 4 if source.augment else None
    assert moved is not None
    assert moved.any()
    assert is_black[moved].flatten(1).sum(1).ge(4).all()


def test_floats_pass_through() -> None:
    x = torch.randn(5, 4)
    assert torch.equal(TensorSource(x, torch.zeros(5)).__getitems__([(0, 3)])[0], x[3:4])


def test_labels_out_of_range() -> None:
    check_labels(torch.tensor([0, 9]), 10, "y")
    for wrong in (-1, 10):
        message = rf"labels 0 to 9 in y_test, but found {wrong} \(1 of 2 labels"
        with pytest.raises(DataError, match=message):
            check_labels(torch.tensor([0, wrong]), 10, "y_test")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    check_finite(torch.tensor([1.0]), "x")
    with pytest.raises(
        DataError, match=r"finite values in x_train, but 1 of 2 are NaN or infinite"
    ):
        check_finite(torch.tensor([1.0, bad]), "x_train")


def test_unknown_augmentation() -> None:
    with pytest.raises(ConfigError, match=r"one of crop_flip, crop, none, got 'mixup'"):
        check_augment("mixup")


def test_samples_held_elsewhere_make_the_same_batches() -> None:
    x, y = torch.randint(0, 256, (12, 3, 6, 6), dtype=torch.uint8), torch.arange(12) % 3
    source = TensorSource(x, y, (0.5,) * 3, (0.2,) * 3, CropFlip(12, padding=1, flip=True, seed=0))
    moved = source.to("cpu")
    pairs = [(2, i) for i in (5, 0, 11)]
    for ours, theirs in zip(moved.__getitems__(pairs), source.__getitems__(pairs), strict=True):
        assert torch.equal(ours, theirs)
    assert not moved.is_on_device
    away = source.to("meta")
    assert away.is_on_device
    assert away.augment is not None
    assert away.augment.table(3, torch.device("meta")).device.type == "meta"


def test_a_device_that_is_not_here() -> None:
    source = TensorSource(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ConfigError, match=r"device that torch has here from data\.device=cudda"):
        source.to("cudda")
