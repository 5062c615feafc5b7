"""A config that comes out of a file builds what our own configs name, and nothing else."""

import pytest
import torch

from qat.compose import compose_plain
from qat.errors import ConfigError, QatError
from qat.restore import read_checkpoint, restore
from qat.stored_config import check_stored, known_targets, without_downloads
from tests.runs import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
SECTIONS = ("data", "model", "schedule")
SHELL = {"_target_": "torch.utils.collect_env.run", "command": "touch MARK"}


@pytest.fixture(scope="module")
def config():
    return compose_plain(["recipe=tabular_w8a8", "trainer.accelerator=cpu"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_restored(recipe):
    needs = {"imagenet_resnet18_w4a8": ["data.root=x"], "cifar_resnet20": []}.get(recipe, [])
    config = compose_plain([f"recipe={recipe}", *needs])
    check_stored(config, SECTIONS, ROOT / "last.ckpt")


def test_each_section_has_its_own_classes():
    assert "qat.data.FolderData" in known_targets("data")
    assert known_targets("model") == {"timm.create_model"}
    assert known_targets("schedule") == {"qat.training.schedule.Schedule"}
    assert known_targets("scheme") == frozenset()


def put(config, path, value):
    """Return a copy with another value at a dotted path."""
    if not path:
        return value
    name, _, rest = path.partition(".")
    return {**config, name: put(config.get(name, {}), rest, value)}


def load(path):
    checkpoint = read_checkpoint(path)
    assert checkpoint is not None
    restore(checkpoint)


HOSTILE = {
    "the data": ("data", SHELL),
    "a value of the data": ("data.val_fraction", SHELL),
    "a value in a list": ("data.batch_size", [1, [SHELL]]),
    "the model": ("model", SHELL),
    "a value of the model": ("model.in_features", {"a": SHELL}),
    "the schedule": ("schedule.epochs", SHELL),
    "data as a model": ("model._target_", "qat.data.TabularData"),
    "a trainer as data": ("data._target_", "pytorch_lightning.Trainer"),
    "a class of ours that no config names": ("data._target_", "qat.data.base.DataModule"),
    "what a module of ours imports": ("data._target_", "qat.run.torch.utils.collect_env.run"),
    "no text": ("data._target_", ["os.system"]),
    "a number": ("data._target_", 5),
    "a node": ("data._target_", SHELL),
    "arguments": ("data._args_", ["touch MARK"]),
    "a partial": ("schedule._partial_", True),
    "recursion": ("data._recursive_", True),
    "an environment variable": ("data.path", "${oc.env:HOME}"),
    "another resolver": ("data.path", "a${oc.decode:'1'}"),
    "a model of a hub": ("model.model_name", "hf-hub:somebody/model"),
    "nested without end": ("data.a", eval("[" * 60 + "]" * 60)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_nobody_named_is_not_built(name, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, value = HOSTILE[name]
    content = {"hyper_parameters": {"config": put(config, path, value)}, "state_dict": {}}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(QatError) as error:
        load(tmp_path / "last.ckpt")
    assert path.split(".")[0] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "MARK").exists()


def test_the_user_permits_a_class_by_name(config):
    changed = put(config, "data._target_", "package.module.Data")
    with pytest.raises(ConfigError, match=r"--allow package\.module\.Data"):
        check_stored(changed, ["data"], ROOT / "last.ckpt")
    check_stored(changed, ["data"], ROOT / "last.ckpt", allow=["package.module.Data"])
    check_stored(changed, ["model"], ROOT / "last.ckpt")  # it is not going to be built


def test_an_installed_package_permits_its_own(config, tmp_path, monkeypatch):
    import qat.stored_config

    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1\n")
    points = "[qat.targets]\ndata = mine.module:Data\n"
    (tmp_path / "mine-1.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    qat.stored_config._registered.cache_clear()
    check_stored(put(config, "data._target_", "mine.module.Data"), ["data"], tmp_path)
    qat.stored_config._registered.cache_clear()


def test_weights_of_timm_are_not_fetched_again():
    node = {"_target_": "timm.create_model", "model_name": "resnet18", "drop_rate": 0.1}
    asks = {"pretrained": True, "checkpoint_path": "x", "pretrained_cfg": {"url": "http://x"}}
    assert without_downloads({**node, **asks}) == node
    assert without_downloads({"name": "resnet18", "weights": "DEFAULT"})["weights"] == "DEFAULT"
