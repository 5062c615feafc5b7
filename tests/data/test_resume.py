"""A killed run goes on as if nothing had happened: same batches, same weights, to the last bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat.data import DataModule, DigitsData

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",  # Lightning wants more workers than the test.
    "ignore:.*LeafSpec.*:FutureWarning",  # Lightning 2.6 with torch 2.15.
    "ignore:The dirpath has changed.*",  # Lightning is right, and the test means it.
    "ignore:.*callbacks used to create the checkpoint.*",
    "ignore:Checkpoint directory .* is not empty.*",
)
EPOCHS = 3
BOUNDS: list[dict[str, int]] = [{}, {"max_epochs": -1, "max_steps": 24}]


class Model(pl.LightningModule):
    """A linear classifier that notes the batches it saw, and may die on one of them."""

    def __init__(self, die_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(64, 10)
        self.die_at = die_at
        self.seen: list[tuple[int, int, float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if len(self.seen) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((self.current_epoch, batch_idx, float(x.double().sum())))
        return F.cross_entropy(self.linear(x.flatten(1)), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.linear(batch[0].flatten(1)), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(**kwargs: Any) -> DataModule:
    return DigitsData(channels=1, batch_size=100, seed=3, **kwargs)  # 11 batches of 1,167 samples


def fit(
    model: Model, folder: Path, loading: dict[str, Any], resume: Any = None, **kwargs: Any
) -> Model:
    saving = kwargs.pop("saving", {"every_n_train_steps": 1})
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=kwargs.pop("max_epochs", EPOCHS),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **saving)],
        **kwargs,
    )
    trainer.fit(model, datamodule=data(**loading), ckpt_path=resume, weights_only=True)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bounds", BOUNDS, ids=["epochs", "steps"])
def test_resume_from_every_batch(tmp_path: Path, accumulate: int, bounds: dict[str, int]) -> None:
    settings = {"accumulate_grad_batches": accumulate, **bounds}
    whole = fit(Model(), tmp_path, {}, **settings)
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[-1]))
    assert len(checkpoints) > 11
    for path in checkpoints:
        resumed = fit(Model(), tmp_path / "again", {}, path, **settings)
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], path
        assert same(resumed, whole), path


@pytest.mark.parametrize("saving", [{"every_n_epochs": 1}, {"save_on_train_epoch_end": True}])
@pytest.mark.parametrize("bounds", BOUNDS, ids=["epochs", "steps"])
def test_resume_from_the_end_of_an_epoch(
    tmp_path: Path, saving: dict[str, Any], bounds: dict[str, int]
) -> None:
    whole = fit(Model(), tmp_path, {}, saving=saving, **bounds)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths:
        resumed = fit(Model(), tmp_path / "again", {}, path, saving=saving, **bounds)
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], path
        assert same(resumed, whole), path


def test_resume_twice(tmp_path: Path) -> None:
    bounds = {"max_epochs": -1, "max_steps": 30}
    whole = fit(Model(), tmp_path / "a", {}, saving={"every_n_epochs": 1}, **bounds)
    first = next((tmp_path / "a").glob("*step=11.ckpt"))  # The end of an epoch, then the middle.
    fit(Model(), tmp_path / "b", {}, first, **bounds)
    for step in (12, 17, 22, 25):
        second = next((tmp_path / "b").glob(f"*step={step}.ckpt"))
        resumed = fit(Model(), tmp_path / "c", {}, second, **bounds)
        assert resumed.seen == whole.seen[step:], step
        assert same(resumed, whole), step


def test_resume_with_shortened_epochs(tmp_path: Path) -> None:
    for number, bounds in enumerate(BOUNDS):
        settings = {"limit_train_batches": 5, **bounds}
        whole = fit(Model(), tmp_path / f"{number}", {}, **settings)
        for path in (tmp_path / f"{number}").glob("*.ckpt"):
            resumed = fit(Model(), tmp_path / "again", {}, path, **settings)
            assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], path
            assert same(resumed, whole), path


def test_resume_after_validation_in_mid_epoch(tmp_path: Path) -> None:
    settings = {"saving": {"monitor": None}, "val_check_interval": 4}
    whole = fit(Model(), tmp_path, {}, **settings)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 6
    for path in paths:
        resumed = fit(Model(), tmp_path / "again", {}, path, **settings)
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], path
        assert same(resumed, whole), path


def test_workers_that_read_ahead_change_nothing(tmp_path: Path) -> None:
    whole = fit(Model(), tmp_path, {})
    ahead = fit(Model(), tmp_path / "ahead", {"num_workers": 2})
    assert ahead.seen == whole.seen
    path = next((tmp_path / "ahead").glob("*step=15.ckpt"))
    resumed = fit(Model(), tmp_path / "again", {"num_workers": 1}, path)
    assert resumed.seen == whole.seen[15:]
    assert same(resumed, whole)


def test_killed_process(tmp_path: Path) -> None:
    whole = fit(Model(), tmp_path / "whole", {})
    script = (
        "import sys, runpy, pathlib\n"
        "test = runpy.run_path(sys.argv[1])\n"
        "test['fit'](test['Model'](die_at=17), pathlib.Path(sys.argv[2]), {'num_workers': 1})\n"
    )
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", script, __file__, str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=False, capture_output=True, cwd=root, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    last = max(folder.glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[-1]))
    assert last.stem == "epoch=1-step=17"
    resumed = fit(Model(), folder, {}, last)
    assert resumed.seen == whole.seen[17:]
    assert same(resumed, whole)
