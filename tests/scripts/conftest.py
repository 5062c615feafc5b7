"""Two tiny runs for all tests of scripts, and a way to call a script without a new process."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from qat.assemble import set_up
from qat.cli import quieten
from qat.compose import compose
from qat.fake_quant import fake_quants
from qat.restore import read_checkpoint
from qat.run import run
from qat.training.callbacks.calibrate import observe

ROOT = Path(__file__).parents[2]
SHORT = (
    "schedule.float_epochs=1",
    "schedule.epochs=1",
    "logger=none",
    "callbacks.monitor=null",
    "callbacks.learning_rate=null",
    "callbacks.progress=null",
    "trainer.accelerator=cpu",
    "compile=off",
)


def train(folder, *overrides):
    with warnings.catch_warnings():
        quieten()  # as the command line does
        run(compose([*SHORT, *overrides], folder))
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, worker_id):
    """Train once for all workers; nothing may write into these folders."""
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent

    def run_once(name, *overrides):
        folder, done = root / name, root / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                train(folder, *overrides)
                done.touch()
        return folder

    return run_once


@pytest.fixture(scope="session")
def table_run(finished_run):
    """The folder of a finished run on 4 features, 10 classes."""
    return finished_run("table", "recipe=tabular_w8a8")


@pytest.fixture(scope="session")
def image_run(finished_run):
    """The folder of a finished run on RGB digits of 8x8 pixels."""
    return finished_run("image", "recipe=resnet_w8a8", "schedule.float_epochs=2")


@pytest.fixture
def load_script(monkeypatch):
    """Import a script by its name, with those beside it in reach."""
    monkeypatch.syspath_prepend(ROOT / "scripts")

    def load(name):
        spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"scripts/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def call(load_script, capsys):
    """Call a script's main; returns exit status, output and error output."""

    def run_main(name, *arguments):
        try:
            with warnings.catch_warnings():
                status = load_script(name).main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run_main


@pytest.fixture
def refuse(call):
    """Call a script that must end in one sentence; returns the sentence."""

    def run_main(name, *arguments):
        status, _, error = call(name, *arguments)
        assert status == 1
        assert error.startswith("qat: ")
        assert error.count("\n") == 1
        return error

    return run_main


@pytest.fixture
def early_checkpoint(table_run, tmp_path):
    """Save what a run would after some float training, or right after its calibration."""

    def save(*, calibrated):
        checkpoint = read_checkpoint(table_run / "checkpoints" / "last.ckpt")
        assert checkpoint is not None
        setup = set_up(checkpoint.config)
        model = setup.captured
        if calibrated:
            observe(model, list(fake_quants(model)), setup.data.calibration_batches(2))
        path = tmp_path / "early.ckpt"
        state = {f"model.{k}": v for k, v in model.state_dict().items()}
        content = {"state_dict": state, "hyper_parameters": {"config": checkpoint.config}}
        torch.save(content, path)
        return path

    return save


class Payload:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def unsafe_checkpoint(tmp_path):
    """Save a checkpoint that would run code; after the test, check that it did not."""
    torch.save({"state_dict": Payload(tmp_path / "pwned")}, path := tmp_path / "unsafe.ckpt")
    yield path
    assert not (tmp_path / "pwned").exists()
