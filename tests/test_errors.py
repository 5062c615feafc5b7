"""Every mistake at the command line ends in one sentence: what came, where, what to do."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from qat.cli import main
from qat.models import build
from tests.runs import ROOT, train

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers
TINY = ["recipe=tabular_w8a8", "schedule.float_epochs=0", "schedule.epochs=1", "logger=none"]
DIGITS = ["recipe=resnet_w4a8", "schedule.float_epochs=0", "schedule.epochs=1", "logger=none"]

UNTRACEABLE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(4, num_classes)
    def forward(self, x):
        if x.sum() > 0:  # the line to name
            x = x * 2
        return self.layer(x)
"""


def fails(arguments, folder, monkeypatch, capsys):
    """Run the command inside ``folder`` and return its one sentence."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "hydra.output_subdir=null"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qat: ")]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            [*DIGITS, "channels_last=perhaps"],
            ["channels_last", "true or false", "got 'perhaps'", "correct"],
        ),
        (
            [*DIGITS, "keep_memory=maybe"],
            ["keep_memory", "true or false", "got 'maybe'", "correct"],
        ),
        (
            [*DIGITS, "compile=regionl"],
            ["compile", "off or regional or step", "'regionl'", "did you mean regional"],
        ),
        ([*DIGITS, "checkpointing=1"], ["segments from 2 on", "got 1", "correct"]),
        (
            [*DIGITS, "checkpointing=auto", "compile=step"],
            ["checkpointing=off with compile=step", "'auto'", "compile=regional"],
        ),
        (["recipe=resnet_w4a9"], ["recipe", "'resnet_w4a9'", "did you mean", "resnet_w4a8"]),
        (["model=resnet21"], ["model", "'resnet21'", "did you mean"]),
        (["data=digit"], ["data", "'digit'", "did you mean", "digits"]),
        (["optimzer=sgd"], ["No key optimzer", "optimizer?", "--help"]),
        (["schedule.epoch=3"], ["No key schedule.epoch", "schedule.epochs?", "--help"]),
        (["data=arrays"], ["value for data.path", "data.path=..."]),
        (
            [*TINY, "model=custom", "model._target_=nosuch.Net"],
            ["No module named 'nosuch'", "model._target_=nosuch.Net", "is its package installed"],
        ),
        ([*DIGITS, "scheme.rules.body.weight.bits=17"], ["weight.bits", "from 1 to 16", "got 17"]),
        ([*DIGITS, "scheme.rules.body.weight.bits=0"], ["weight.bits", "from 1 to 16", "got 0"]),
        (
            [*DIGITS, "scheme.rules.body.weight.bits=x"],
            ["weight.bits", "whole number", "got 'x'", "correct"],
        ),
        (
            [*TINY, "+scheme.rules.mine={match: nosuch, weight: {bits: 4}}"],
            ["rule 'mine'", "match='nosuch'", "correct the pattern"],
        ),
        ([*TINY, "target=tensort"], ["name of a target", "tensort", "did you mean tensorrt?"]),
        (
            [
                *TINY,
                "target=tensorrt",
                "+scheme.rules.mine={match: '@input', activation: {symmetric: false}}",
            ],
            ["target=tensorrt", "got 2 errors", "'input.input'", "set symmetric=true"],
        ),
        ([*TINY, "schedule.fold=0.1"], ["schedule.freeze_batch_norm <= schedule.fold", "0.1"]),
        ([*TINY, "ckpt=nosuch.pt"], ["checkpoint file at nosuch.pt", "correct the path"]),
        ([*TINY, "ckpt_path=nosuch.ckpt"], ["resume from", "nosuch.ckpt", "without ckpt_path"]),
        (
            [*TINY, "callbacks.calibrate.num_batches=0"],
            ["callbacks.calibrate.num_batches", "at least 1", "got 0"],
        ),
        ([*TINY, "data=folder", "data.root=nosuch"], ["nosuch", "xpected"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistake_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    sentence = fails(arguments, tmp_path, monkeypatch, capsys)
    assert [word for word in words if word not in sentence] == [], sentence


def test_an_impossible_target_costs_no_training(tmp_path, monkeypatch, capsys):
    fails([*DIGITS, "target=tensorrt"], tmp_path, monkeypatch, capsys)
    assert list(tmp_path.rglob("*.ckpt")) == []


def corrupt(path):
    path.write_bytes(b"not a checkpoint")


def pickled(path):
    torch.save({"state_dict": {"f": os.system}}, path)


def other_architecture(path):
    torch.save(build("resnet32", 10).state_dict(), path)


def other_classes(path):
    torch.save(build("resnet20", 7).state_dict(), path)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (corrupt, ["c.pt", "cannot be read", "copy or download"]),
        (pickled, ["c.pt", "Python code", "state_dict"]),
        (other_architecture, ["c.pt", "unexpected: layer1.3", "model.name"]),
        (other_classes, ["(7, 64)", "(10, 64)", "number of classes"]),
    ],
)
def test_checkpoint_that_cannot_be_used(write, words, tmp_path, monkeypatch, capsys):
    write(tmp_path / "c.pt")
    sentence = fails([*DIGITS, "ckpt=c.pt"], tmp_path, monkeypatch, capsys)
    assert [word for word in words if word not in sentence] == [], sentence


def test_empty_folder_and_differing_classes(tmp_path, monkeypatch, capsys):
    from PIL import Image

    folder = [*DIGITS, "data=folder", "data.root=images", "data.size=32", "data.num_workers=0"]
    (tmp_path / "images/train").mkdir(parents=True)
    assert "images" in fails(folder, tmp_path, monkeypatch, capsys)
    for place in ("train/a", "train/b", "val/a", "val/c"):
        (tmp_path / "images" / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / place / "0.png")
    sentence = fails(folder, tmp_path, monkeypatch, capsys)
    assert "class" in sentence
    assert "val" in sentence


def test_input_that_is_not_finite(tmp_path, monkeypatch, capsys):
    x = np.zeros((20, 4), dtype=np.float32)
    x[3, 2] = np.nan
    y = np.arange(20) % 10
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    arrays = ["data=arrays", "data.path=a.npz", "data.augment=none"]
    sentence = fails([*TINY, *arrays], tmp_path, monkeypatch, capsys)
    assert "x_train of a.npz" in sentence
    assert "finite" in sentence


def test_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    options = ["schedule.float_epochs=1", "optimizer.rates.lr=1e-3", "optimizer.rates.qat_lr=1e36"]
    sentence = fails([*TINY, *options, "data.batch_size=1000"], tmp_path, monkeypatch, capsys)
    assert "expected a finite loss" in sentence
    assert "lower optimizer.rates.lr" in sentence
    (path,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    assert path.name in sentence
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(bool(v.isfinite().all()) for k, v in state.items() if k.endswith("linear.weight"))


def test_untraceable_model_names_the_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "untraceable.py").write_text(UNTRACEABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ["model=custom", "model._target_=untraceable.Net"]
    sentence = fails([*TINY, *model], tmp_path, monkeypatch, capsys)
    assert "untraceable.py:8 (if x.sum() > 0:" in sentence
    assert "tensor operations" in sentence


def test_run_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    options = [*TINY, f"hydra.run.dir={tmp_path}/file/run"]
    sentence = fails(options, tmp_path, monkeypatch, capsys)
    assert "file/run" in sentence
    assert "hydra.run.dir" in sentence


def test_full_disk_ends_in_a_sentence(tmp_path):
    """Files may not grow over 20 kB: checkpoints fail as they do on a full disk."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv.pop())\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from qat.cli import main; main()\n"
    )
    command = [sys.executable, "-c", code, *DIGITS, "trainer.limit_train_batches=1", str(ROOT)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("qat: expected")
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr


def test_traceback_is_shown_when_asked_for(tmp_path):
    plain, full = (train(tmp_path, "recipe=nosuch", *flag) for flag in ([], ["--traceback"]))
    assert plain.returncode == 1
    assert "Traceback" not in plain.stderr
    assert plain.stderr.startswith("qat: expected the name of a recipe, got 'nosuch'")
    assert full.returncode != 0
    assert "Traceback" in full.stderr
