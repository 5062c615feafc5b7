"""Every quantizer trains: W4A4 digits through the real pipeline, close to the float network."""

import pytest

from qat.compose import compose
from qat.run import run

QUIET = ["trainer.accelerator=cpu", "callbacks.progress=null", "callbacks.calibrate.num_batches=2"]
BASE = [
    "data=digits",
    "model=custom",
    "model._target_=tests.quantizers.networks.small",
    "logger=none",
    "export.threshold=0.8",  # a CPU without VNNI saturates sums of the 8-bit ends
    *QUIET,
]
ADAM = ["optimizer=adamw", "optimizer.rates.qat_lr=0.002"]
PENALTY = "callbacks.size_penalty={_target_: qat.training.callbacks.SizePenalty, weight: 0.02}"
STOCHASTIC = [
    f"scheme.rules.body.{kind}.quantizer={{name: lsq, rounding: stochastic, gradient: ewgs}}"
    for kind in ("weight", "activation")
]
FLOOR = ["scheme.rules.body.weight.quantizer={name: lsq, rounding: floor, gradient: dsq}"]
POINTS = 1.5
FOUR_BITS = "scheme.rules.body.activation.bits=4"
AFFINE = "scheme.rules.body.activation.symmetric=false"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on loaders and loggers
]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """The float network, trained, as a checkpoint."""
    folder = tmp_path_factory.mktemp("float")
    options = [*BASE, "scheme=w8a8", "schedule.float_epochs=20", "schedule.epochs=0"]
    run(compose(options, folder))
    return folder / "checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("lsq", []),
        ("lsq_plus", [AFFINE]),
        ("pact", []),
        ("ewgs", []),
        ("dorefa", []),
        ("tqt", ADAM),
        ("dsq", []),
        ("lsq", STOCHASTIC),
        ("lsq", FLOOR),
        ("learned_bits", []),
        ("learned_bits", [*ADAM, PENALTY]),
    ],
)
def test_four_bits_are_close_to_float(word, options, ckpt, tmp_path):
    training = ["schedule.epochs=10", "optimizer.rates.qat_lr=0.02"]
    names = [*BASE, "scheme=w4a4", f"ckpt='{ckpt}'", f"quantizer={word}", *training, *options]
    report = run(compose(names, tmp_path))
    assert report is not None
    assert report.verification.agreement["converted"] == 1
    assert {layer.bits for layer in report.layers} in ({4, 8}, {5, 8})  # DoReFa's codes have 5
    assert report.accuracy["converted"] >= report.accuracy["float"] - POINTS


@pytest.mark.parametrize(
    ("word", "scheme", "options", "points"),
    [
        ("apot", "w4a4", [], POINTS),
        ("power_of_two", "w4a4", [], POINTS),
        ("n2uq", "w4a4", [], POINTS),
        ("ternary", "w2a2", [FOUR_BITS], POINTS),
        ("ternary_learned", "w2a2", [FOUR_BITS], POINTS),
        ("binary", "w1a1", [], 6.0),
        ("binary", "w1a2", ["quantizer.activation=lsq"], 6.0),
        ("ir_net", "w1a1", [*ADAM, "schedule.epochs=40"], 6.0),
    ],
)
def test_looked_up_codes_are_close_to_float(word, scheme, options, points, ckpt, tmp_path):
    training = ["schedule.epochs=10", "optimizer.rates.qat_lr=0.02"]
    names = [*BASE, f"scheme={scheme}", f"ckpt='{ckpt}'", f"quantizer={word}", *training, *options]
    report = run(compose(names, tmp_path))
    assert report is not None
    assert report.verification.agreement["converted"] == 1
    assert report.accuracy["converted"] >= report.accuracy["float"] - points
