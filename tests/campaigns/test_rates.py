"""Checkpoints of other habits through ``recipe=resnet_w4a4 ckpt=...``, with no rate given.

Three networks are trained in float, then quantized with the rate that the probe picks. What comes
out is never below what calibration alone gives. ``QAT_SHARED`` names another folder of the data;
``QAT_RATE_SEED`` (0) is another seed. A quarter of an hour or more for each network on one core.
"""

import importlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QAT_SHARED", ROOT.parent / "shared"))
SEED = int(os.environ.get("QAT_RATE_SEED", "0"))
DATA, WEIGHTS = SHARED / "data" / "cifar10.npz", SHARED / "checkpoints"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not DATA.is_file(), reason=f"needs CIFAR-10 in '{DATA}'"),
]


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "mobilenet"])
def test_the_default_rate_is_never_below_post_training(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    rates = importlib.import_module("rates")
    inputs = rates.make_inputs(name, DATA, WEIGHTS, tmp_path)
    report = rates.train(rates.words(name, *inputs, SEED), tmp_path / "runs" / name)
    print(rates.row(name, "probed", report))  # noqa: T201 (the figures of the campaign)
    assert report["learning_rate"]["tried"]
    assert report["accuracy"]["onnxruntime"] >= report["accuracy"]["post_training"]
