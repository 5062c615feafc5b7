import pytest
import torch
from torch.utils.data import DataLoader

from qat.data import TabularData, sampler as module
from qat.data.sampler import EpochBatchSampler
from qat.data.source import derive_seed
from qat.errors import DataError


def ranks(monkeypatch: pytest.MonkeyPatch, sampler: EpochBatchSampler, world: int) -> list[list]:
    shares = []
    for rank in range(world):
        monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, world))
        shares.append(list(sampler))
    return shares


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once_with_its_epoch(shuffle: bool) -> None:
    sampler = EpochBatchSampler(10, 4, shuffle=shuffle)
    sampler.set_epoch(7)
    batches = list(sampler)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(pair for b in batches for pair in b) == [(7, i) for i in range(10)]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    a, b, c = EpochBatchSampler(50, 5, 1), EpochBatchSampler(50, 8, 1), EpochBatchSampler(50, 5, 2)
    torch.manual_seed(123)
    assert torch.equal(a.order(3), b.order(3))
    assert not torch.equal(a.order(3), a.order(4))
    assert not torch.equal(a.order(3), c.order(3))


def test_start_skips_batches_and_length_stays() -> None:
    sampler = EpochBatchSampler(10, 3, drop_last=True)
    whole = list(sampler)
    sampler.start = 2
    assert list(sampler) == whole[2:]
    assert len(sampler) == len(whole) == 3


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    sampler = EpochBatchSampler(24, 8)
    [whole] = ranks(monkeypatch, sampler, 1)
    shares = ranks(monkeypatch, sampler, world)
    for number, batch in enumerate(whole):
        assert [share[number] for share in shares] == [batch[r::world] for r in range(world)]


def test_last_batch_is_filled_up_so_that_ranks_stay_in_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = ranks(monkeypatch, EpochBatchSampler(9, 4), 4)
    assert [len(batch) for share in shares for batch in share] == [1] * 12
    assert {i for share in shares for batch in share for _, i in batch} == set(range(9))


def test_batch_size_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"3 processes can share evenly, but data\.batch_size is 8; .* of 3"
    ):
        ranks(monkeypatch, EpochBatchSampler(9, 8), 3)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed("order", 0, 1) == 4473484566461243327
    assert derive_seed("a", 1) != derive_seed("a", 2)


def test_lightning_finds_set_epoch() -> None:
    loader = TabularData().train_dataloader()
    assert isinstance(loader, DataLoader)
    from lightning_fabric.utilities.data import _set_sampler_epoch

    _set_sampler_epoch(loader, 5)
    assert loader.order.epoch == 5
