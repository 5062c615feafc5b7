import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat.errors import ConfigError, TrainingError
from qat.export.report import layer_rows
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.integer_layers import IntegerLayer
from qat.layers import fold
from qat.pruning.magnitude import cubic_ratio
from qat.training.callbacks.prune import Prune
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from qat.training.task import QATTask
from tests.helpers import calibrate, make_scheme

STEPS = 40  # 5 epochs of 8


def make_task() -> QATTask:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    )
    captured, plan = prepare(model, make_scheme(8, 8), torch.randn(2, 4, 5, 5))
    rates = Rates(lr=0.05, qat_lr=0.05)
    optimizer = partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    return QATTask(captured, plan, Schedule(0, 5), rates, optimizer)


def images() -> torch.Tensor:
    return torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def fit(
    task: QATTask, *callbacks: pl.Callback, resume: Path | None = None, epochs: int = 5
) -> None:
    labels = torch.arange(64) % 3
    loader = DataLoader(TensorDataset(images(), labels), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(task, loader, ckpt_path=resume, weights_only=True if resume else None)


class Watch(pl.Callback):
    """Note the share of zeros of the first layer after every step, and save in between."""

    def __init__(self, save: Path | None = None):
        self.zeros: list[float] = []
        self.save = save

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        model: Any = pl_module.model
        layer = model.get_submodule("0")
        self.zeros.append((layer.weight == 0).double().mean().item())

    def on_train_epoch_end(self, trainer, pl_module):
        if self.save is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.save)


def test_the_ramp_and_its_end():
    task, watch = make_task(), Watch()
    prune = Prune(0.75, end=0.5, every_n_steps=5)
    fit(task, prune, watch)
    total = 8 * 4 * 9
    for step, share in enumerate(watch.zeros):
        last = step // 5 * 5  # masks move every fifth step
        expected = round(cubic_ratio(last / STEPS / 0.5, 0.75) * total) / total
        assert share == pytest.approx(expected)
    assert watch.zeros[-1] == 0.75
    for _, layer in prune.targets(task.model):
        assert layer.weight_mask.mean().item() == pytest.approx(0.25)
        assert (layer.weight[layer.weight_mask == 0] == 0).all()


def test_pruned_weights_are_code_zero_after_conversion():
    task = make_task()
    fit(task, Prune(0.5, end=0.5), epochs=2)
    captured = task.model
    calibrate(captured, images())  # pyright: ignore[reportArgumentType]
    fold(captured)
    masks = {n: layer.weight_mask.clone() for n, layer in Prune(0.5).targets(captured)}
    converted = convert(captured)  # pyright: ignore[reportArgumentType]
    assert torch.equal(converted(images()), captured(images()))
    for name, mask in masks.items():
        layer = converted.get_submodule(name)
        assert isinstance(layer, IntegerLayer)
        assert (layer.weight_codes[mask == 0] == 0).all()
        assert not any("mask" in key for key in layer.state_dict())
    assert all(row.sparsity >= 0.5 for row in layer_rows(converted))


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 0.5), ("1:4", 0.25), ("1:2", 0.5)])
def test_patterns_hold_along_the_inputs(pattern, kept):
    task = make_task()
    fit(task, Prune(0.9, pattern, end=0.5), epochs=1)  # the pattern's ratio wins
    group = int(pattern.split(":")[1])
    for _, layer in Prune(0.5).targets(task.model):
        mask = layer.weight_mask.movedim(1, -1).reshape(-1, group)
        assert (mask.sum(1) == group * kept).all()


def test_a_resumed_run_ends_like_one_that_was_not_cut(tmp_path):
    whole = make_task()
    fit(whole, Prune(0.6, end=0.8, every_n_steps=3), Watch(tmp_path / "two.ckpt"))
    resumed, prune = make_task(), Prune(0.6, end=0.8, every_n_steps=3)
    fit(resumed, prune, resume=tmp_path / "two.ckpt")
    assert prune.current == pytest.approx(0.6)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert list(ours) == list(theirs)
    assert any("weight_mask" in key for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_masks_never_shrink_and_come_back_from_the_state():
    prune = Prune(0.5)
    prune.load_state_dict({"current": 0.4})
    assert prune.state_dict() == {"current": 0.4}
    task = make_task()
    prune.add_masks(task.model)
    layer = prune.targets(task.model)[0][1]
    prune._prune_to(task, 0.01)  # behind where the run already was
    assert layer.weight_mask.all()
    prune._prune_to(task, 1.0)
    assert layer.weight_mask.mean().item() == pytest.approx(0.5)


def test_the_ramp_goes_from_its_start_to_its_end():
    task, prune = make_task(), Prune(0.5, start=0.25, end=0.75)
    prune.add_masks(task.model)
    for progress, along in ((0.1, 0.0), (0.25, 0.0), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)):
        prune._prune_to(task, progress)
        assert prune.current == pytest.approx(cubic_ratio(along, 0.5))
    at_once = Prune(0.5, start=0.3, end=0.3)
    at_once.add_masks(task.model)
    at_once._prune_to(task, 0.31)
    assert at_once.current == 0.5


def test_layers_and_skip():
    model = make_task().model
    assert [n for n, _ in Prune(0.5).targets(model)] == ["0", "4"]
    assert [n for n, _ in Prune(0.5, layers="4").targets(model)] == ["4"]
    assert [n for n, _ in Prune(0.5, skip="4|9").targets(model)] == ["0"]
    with pytest.raises(ConfigError, match=r"pruning\.layers='conv\*'"):
        Prune(0.5, layers="conv*").targets(model)
    with pytest.raises(ConfigError, match=r"without '0\|4'"):
        Prune(0.5, skip="0|4").targets(model)


def test_only_targets_are_pruned():
    task = make_task()
    fit(task, Prune(0.5, skip="4"), epochs=1)
    assert "weight_mask" not in task.model.get_submodule("4")._buffers
    assert task.model.get_submodule("0").get_buffer("weight_mask").mean() == 0.5


def test_where_nothing_is_trained_all_is_pruned_at_once():
    task = make_task()
    fit(task, Prune(0.5), epochs=0)
    assert all(layer.weight_mask.mean() == 0.5 for _, layer in Prune(0.5).targets(task.model))


def test_a_share_that_is_not_reached_is_an_error():
    task, prune = make_task(), Prune(0.5)
    prune.add_masks(task.model)
    name, layer = prune.targets(task.model)[0]
    for zeros, reached in ((10, False), (142, False), (143, True), (144, True)):  # of 288, to one
        layer.weight_mask.flatten()[:zeros] = 0
        expected = pytest.raises(TrainingError, match=f"50.0%.*layer '{name}'")
        with nullcontext() if reached else expected:
            prune._check(name, layer)
    exact: Any = SimpleNamespace(weight_mask=torch.ones(8, 8))  # shares that no float rounds
    exact.weight_mask.flatten()[:31] = 0
    prune._check("exact", exact)


@pytest.mark.parametrize(
    "values",
    [{"ratio": 1.0}, {"ratio": -0.1}, {"ratio": 0.5, "start": 0.6, "end": 0.5},
     {"ratio": 0.5, "end": 1.5}, {"ratio": 0.5, "pattern": "4:2"}],
)  # fmt: skip
def test_values_that_make_no_sense(values):
    with pytest.raises(ConfigError, match="pruning"):
        Prune(**values)
