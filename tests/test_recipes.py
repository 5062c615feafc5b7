"""Every recipe composes, builds and trains; sweeps and the trainer's options work."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from qat.assemble import set_up
from qat.batch_norm import Stage, batch_norms
from qat.compose import compose, compose_plain
from qat.fake_quant import Phase, fake_quants
from qat.run import run
from tests.helpers import slow_but
from tests.runs import ROOT, train

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
TWO_STEPS = [
    "schedule.float_epochs=0",
    "schedule.epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "data.batch_size=8",
    "callbacks.calibrate.num_batches=1",
    "callbacks.progress=null",
    "logger=none",
    "export.threshold=1.0",
    "export.trial=false",  # tests/test_trial.py
    "compile=off",  # compiling takes longer than two steps do; tests/training/test_compiled.py
]
TINY = [
    "recipe=tabular_w8a8",
    *TWO_STEPS[1:2],
    "trainer.accelerator=cpu",
    "compile=off",
    "callbacks.progress=null",
]


def images(folder: Path) -> Path:
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            target = folder / split / name
            target.mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (40, 40), (20 * i, 100 * number, 7)).save(target / f"{i}.png")
    return folder


def epochs(recipe: str) -> list[str]:
    return ["schedule.epochs=0"] if recipe.endswith("_ptq") else []


def threshold(recipe: str) -> list[str]:
    """Grids brought by values that a float LayerNorm made turn a few ties of a random model."""
    return ["export.threshold=0.995"] if "dynamic" in recipe else []


def special(recipe: str, folder: Path) -> list[str]:
    if recipe.startswith(("resnet", "cifar")):  # few large batches are evaluated faster
        small = ["data=digits", "data.batch_size=64"]
        return small + epochs(recipe)
    if recipe.startswith("gpt"):
        return ["data.num_train=64", "data.num_test=16", *epochs(recipe), *threshold(recipe)]
    if not recipe.startswith("imagenet"):
        return []
    return [
        f"data.root='{images(folder)}'",
        "data.size=32",
        "data.num_workers=0",
        "model.weights=null",
    ]


pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers


@pytest.mark.parametrize(
    "recipe", slow_but(RECIPES, "gpt_w4", "gpt_w8a8_dynamic_ptq", "tabular_w8a8")
)
def test_recipe_trains_two_steps_and_ships(recipe, tmp_path):
    overrides = [f"recipe={recipe}", *TWO_STEPS, *special(recipe, tmp_path / "images")]
    report = run(compose(overrides, tmp_path / "run"))
    assert report is not None
    assert {"float", "post_training", "fake_quant"} <= report.accuracy.keys()
    for values in (report.accuracy, report.perplexity):
        assert all(math.isfinite(value) for value in values.values())
    assert report.perplexity.keys() == report.accuracy.keys()
    assert report.layers
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert (tmp_path / "run" / "plan.txt").is_file()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_its_bits(recipe, tmp_path):
    config = compose_plain([f"recipe={recipe}", *special(recipe, tmp_path)])
    setup = set_up(config)
    weight_bits = {w.format.spec.bits for w in setup.plan.weights.values()}
    expected = int(recipe.partition("_w")[2][0]) if "_w" in recipe else 8
    assert weight_bits in ({expected, 8}, {expected})
    assert {f.phase for f in fake_quants(setup.captured)} == {Phase.FLOAT}
    assert {n.stage for n in batch_norms(setup.captured)} <= {Stage.LIVE}


@pytest.mark.parametrize(
    "options",
    [  # two steps leave no margins, and what reads dynamic sites is summed in float
        ["scheme=8da4w", "export.threshold=0.9"],
        pytest.param(["scheme=w8a8", "scheme.rules.input=null"], marks=pytest.mark.slow),
        ["model.tied=true"],
    ],
    ids=["8da4w", "w8a8", "tied"],
)
def test_schemes_of_language_models(options, tmp_path):
    small = [*special("gpt_w4", tmp_path), "model.width=32", "model.depth=1", "data.context=16"]
    report = run(compose(["recipe=gpt_w4", *TWO_STEPS, *small, *options], tmp_path))
    assert report is not None
    assert report.verification.passed


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.precision=bf16-mixed"],
        [
            "trainer.gradient_clip_val=0.5",
            "trainer.accumulate_grad_batches=2",
            "schedule.activations=0.3",
        ],
        pytest.param(
            ["scheme.batch_norm=folded", "quantizer=uniform", "observer=moving_average"],
            marks=pytest.mark.slow,
        ),
        ["pruning=magnitude", "pruning.ratio=0.25"],
    ],
    ids=["bf16", "clip-weights-first", "folded", "pruned"],
)
def test_options(options, tmp_path):
    report = run(compose([*TINY, "schedule.float_epochs=1", *options], tmp_path))
    assert report is not None
    assert report.verification.passed
    if "pruning=magnitude" in options:
        assert report.layers[0].sparsity >= 0.25


def test_what_the_target_makes_of_a_plan_is_said_once(tmp_path, caplog):
    options = ["schedule.float_epochs=0", "scheme=w4a4", "scheme.rules.ends=null"]
    with caplog.at_level("WARNING", "qat"):
        run(compose([*TINY, *options], tmp_path))
    lines = [r.message for r in caplog.records if r.message.startswith("warning: ")]
    assert [line.partition(" are")[0] for line in lines] == [
        "warning: 'input.input': 4-bit activations",
        "warning: 'linear.weight': 4-bit weights",
    ]


def test_early_stopping_still_ships(tmp_path):
    options = ["schedule.epochs=30", "schedule.float_epochs=0", "callbacks=early_stopping"]
    patience = ["callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=50"]
    report = run(compose(["recipe=tabular_w8a8", *options, *patience], tmp_path))
    assert report is not None
    assert report.verification.passed
    rows = (tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()
    assert max(int(r.split(",")[rows[0].split(",").index("epoch")] or 0) for r in rows[1:]) < 10


def test_sweep_over_bits(tmp_path):
    done = train(tmp_path, "--multirun", *TINY, "scheme.rules.body.weight.bits=4,6",
                 "scheme.rules.ends=null")  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = sorted(tmp_path.glob("multirun/tabular_w8a8/*/*/report.json"))
    bits = [{row["bits"] for row in json.loads(r.read_text())["layers"]} for r in reports]
    assert bits == [{4}, {6}]
