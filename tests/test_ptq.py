"""Post-training quantization: the same pipeline, with no step behind the float epochs."""

import json

import pytest
import torch

from qat.compose import compose
from qat.data import DigitsData
from qat.errors import CheckpointError
from qat.models import build
from qat.restore import finish, read_checkpoint, restore
from qat.run import run
from qat.training.evaluate import evaluate
from tests.helpers import warm_up

QUIET = [
    "trainer.accelerator=cpu",
    "callbacks.progress=null",
    "callbacks.calibrate.num_batches=2",
    "logger=none",
    "compile=off",
]
TABLE = ["recipe=tabular_w8a8", "schedule.epochs=0", *QUIET]

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A float ResNet-20 whose batch-norms know the data."""
    torch.manual_seed(0)
    data = DigitsData()
    data.setup()
    model = warm_up(build("resnet20", 10), data.calibration_batches(1)[0])
    torch.save(model.state_dict(), path := tmp_path_factory.mktemp("float") / "resnet20.pt")
    return path


def saved(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def reported(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def twice(ckpt, tmp_path_factory):
    """Two folders of the same command: the recipe, from a float checkpoint."""
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    for folder in folders:
        run(compose(["recipe=resnet_w8a8_ptq", f"ckpt='{ckpt}'", *QUIET], folder))
    return folders


def test_the_recipe_passes_its_gate_and_gives_the_same_twice(twice):
    a, b = twice
    for name in ("model.onnx", "model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    report = reported(a)
    kinds = {"float", "post_training", "fake_quant", "converted", "onnxruntime"}
    assert kinds <= report["accuracy"].keys()
    assert report["passed"]
    for key in ("accuracy", "agreement", "layers", "sites"):
        assert report[key] == reported(b)[key]
    assert {"fold", "convert", "export", "verify"} == report["seconds"].keys()


def test_no_parameter_moves(ckpt, twice):
    state, before = saved(twice[0]), torch.load(ckpt, weights_only=True)
    assert state["global_step"] == 0
    assert not [k for k in before if not torch.equal(before[k], state["state_dict"][f"model.{k}"])]
    model = build("resnet20", 10)
    model.load_state_dict(before)
    data = DigitsData()
    data.setup()
    expected = evaluate(model, data.test_dataloader()).accuracy
    assert reported(twice[0])["accuracy"]["float"] == expected


def test_the_checkpoint_is_the_finished_run(twice):
    checkpoint = read_checkpoint(twice[0] / "checkpoints/last.ckpt")
    assert checkpoint is not None
    assert finish(restore(checkpoint).captured) == "fold"
    assert {k: v.accuracy for k, v in checkpoint.scores.items()} == {
        k: reported(twice[0])["accuracy"][k] for k in ("float", "post_training")
    }
    assert set(checkpoint.seconds) == {"fold"}


@pytest.mark.slow
@pytest.mark.parametrize("float_epochs", [0, 1])
def test_resuming_repeats_the_artifact(float_epochs, tmp_path):
    options = [*TABLE, f"schedule.float_epochs={float_epochs}"]
    names = ("model.onnx", "model.safetensors")
    run(compose(options, tmp_path))
    before, seconds = [(tmp_path / n).read_bytes() for n in names], reported(tmp_path)["seconds"]
    assert not (tmp_path / "checkpoints/best.ckpt").exists()  # no quantized epoch was validated
    run(compose([*options, "ckpt_path=last"], tmp_path))
    assert [(tmp_path / n).read_bytes() for n in names] == before
    assert reported(tmp_path)["seconds"]["fold"] == seconds["fold"]


@pytest.mark.slow
def test_float_epochs_are_those_of_the_same_run_without_quantization(tmp_path):
    steps = len(DigitsData(batch_size=128).train_dataloader())
    options = ["recipe=resnet_w4a8", "schedule.float_epochs=1", "schedule.epochs=0", *QUIET]
    report = run(compose([*options, "data.batch_size=128"], tmp_path))
    assert report is not None
    assert report.verification.passed
    assert {row["bits"] for row in reported(tmp_path)["layers"]} == {4, 8}
    state = saved(tmp_path)
    assert state["global_step"] == steps
    distill = next(v for k, v in state["callbacks"].items() if k.startswith("Distill"))
    assert distill == {"done": True, "teacher": None}  # nobody learns from it


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["schedule.activations=0.4", "scheme.batch_norm=folded"],
        ["pruning=two_of_four"],
        ["trainer.max_epochs=1", "schedule.float_epochs=5"],
    ],
    ids=["activations", "pruned", "capped"],
)
def test_options(options, tmp_path):
    report = run(compose([*TABLE, "schedule.float_epochs=0", *options], tmp_path))
    assert report is not None
    assert report.verification.passed
    assert report.layers[0].sparsity >= 0.5 or "pruning=two_of_four" not in options
    assert {"float", "post_training"} <= report.accuracy.keys()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["8da4w", "int4", "w8a8"])
def test_schemes_of_language_models(scheme, tmp_path):
    small = ["data.num_train=64", "data.num_test=16", "data.context=16", "data.batch_size=8"]
    small += ["model.width=32", "model.depth=1", "schedule.float_epochs=0", "schedule.epochs=0"]
    ties = ["export.threshold=0.9"]  # nothing is trained: many words are equally likely
    options = ["recipe=gpt_w4", f"scheme={scheme}", *QUIET, *small, *ties]
    report = run(compose(options, tmp_path))
    assert report is not None
    assert report.verification.passed


def test_a_longer_run_is_not_resumed_as_a_shorter_one(tmp_path):
    options = ["recipe=tabular_w8a8", "schedule.float_epochs=0", *QUIET]
    run(compose([*options, "schedule.epochs=1"], tmp_path))
    with pytest.raises(CheckpointError, match="expected a checkpoint of this very run"):
        run(compose([*options, "schedule.epochs=0", "ckpt_path=last"], tmp_path))
