"""What stands beside or inside a file of somebody else runs nothing."""

import shutil
import sys

import pytest
import torch
import yaml

from qat.assemble import set_up
from qat.compose import compose_plain
from qat.errors import ConfigError
from qat.observers import OBSERVERS, MinMax
from qat.quantizers import LSQ, QUANTIZERS, Uniform, register
from qat.run import _foreign_modules

SHELL = {"_target_": "torch.utils.collect_env.run", "command": "touch MARK"}


BAD_YAML = {
    "references": "a: &a [1]\nb: [*a, *a]\n",
    "tabs": "a:\t- 1\n\t- 2",
    "bytes": b"\xff\xfe\x00",
    "tags": "a: !!python/object/apply:os.system ['touch MARK']",
    "large": "# " + "x" * 2**20,
}


def with_shell(config, path):
    section, key = path.split(".")
    return {**config, section: {**config[section], key: SHELL}}


@pytest.mark.parametrize("kind", [*BAD_YAML, "folder", "none"])
def test_a_config_beside_a_model(kind, call, table_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(table_run / "model.onnx", tmp_path)
    path, content = tmp_path / "config.yaml", BAD_YAML.get(kind, "")
    if kind == "folder":
        path.mkdir()
    elif kind != "none":
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, error = call("evaluate", tmp_path / "model.onnx")
    assert status == 1
    assert error.count("\n") == 1
    assert error.startswith("qat: ")
    assert not (tmp_path / "MARK").exists()


def test_a_hostile_config_beside_a_model(call, table_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(table_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for path in ("data.val_fraction", "model.in_features"):
        (run / "config.yaml").write_text(yaml.safe_dump(with_shell(config, path)))
        status, _, error = call("evaluate", run / "model.onnx")
        assert (status == 1) == path.startswith("data"), error  # a model is in the file itself
        assert not (tmp_path / "MARK").exists()
    assert call("evaluate", run / "model.onnx", "data=tabular")[0] == 0  # the user's own words


def change_config(path, change):
    content = torch.load(path, weights_only=True)
    change(content["hyper_parameters"]["config"])
    torch.save(content, path)


@pytest.mark.parametrize("script", ["evaluate", "export", "verify"])
def test_a_hostile_checkpoint(script, call, table_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(table_run, tmp_path / "run")
    checkpoint = run / "checkpoints" / "last.ckpt"
    change_config(checkpoint, lambda config: config["data"].update(val_fraction=SHELL))
    status, _, error = call(script, run if script == "verify" else checkpoint)
    assert status == 1
    assert "--allow torch.utils.collect_env.run" in error
    assert not (tmp_path / "MARK").exists()


def test_a_class_that_the_user_permits(call, table_run, tmp_path, monkeypatch):
    run = shutil.copytree(table_run, tmp_path / "run")
    checkpoint = run / "checkpoints" / "last.ckpt"
    change_config(checkpoint, lambda config: config["data"].update(_target_="mine.Data"))
    (tmp_path / "mine.py").write_text("from qat.data import TabularData as Data\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "--allow mine.Data" in call("verify", run)[2]
    assert call("verify", run, "--allow", "mine.Data")[0] == 0


MODULE = """
import qat.observers
from qat.quantizers import LSQ, register

@register("mine")
class Mine(LSQ):
    pass

@qat.observers.register("wide")
class Wide(qat.observers.MinMax):
    pass
"""


@pytest.fixture
def own_words(tmp_path, monkeypatch):
    """A module that registers words, in reach of imports; afterwards nobody knows them."""
    (tmp_path / "own_words.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_words"
    sys.modules.pop("own_words", None)
    QUANTIZERS.pop("mine", None)
    OBSERVERS.pop("wide", None)


@pytest.mark.parametrize("script", ["evaluate", "export"])
def test_a_quantizer_of_the_users_own(script, call, refuse, table_run, tmp_path, own_words):
    run = shutil.copytree(table_run, tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"

    def rename(config):
        config["imports"] = [own_words]
        for rule in config["scheme"]["rules"].values():
            rule["weight"] = rule.get("weight") and {**rule["weight"], "quantizer": "mine"}

    change_config(path, rename)
    assert f"imports={own_words}: if you know it and trust it" in refuse(script, path)
    assert "mine" not in QUANTIZERS
    status, _, error = call(script, path, "--allow", own_words)
    assert status == 0, error
    if script == "evaluate":
        change_config(path, lambda config: config.pop("imports"))  # as older runs have none
        assert call(script, path, "--allow", own_words)[0] == 0


def test_a_run_remembers_what_registered_its_words(own_words):
    given = ["recipe=tabular_w8a8", "quantizer.ends.weight=mine", "observer.weight=wide"]
    with pytest.raises(ConfigError, match=r"quantizer\.ends\.weight .* a module of imports"):
        compose_plain(given)
    config = compose_plain([*given, f"imports=[{own_words}]"])
    assert _foreign_modules(set_up(config)) == [own_words]
    assert _foreign_modules(set_up(compose_plain(["recipe=tabular_w8a8"]))) == []


@pytest.mark.parametrize("imports", ["no_such_module", "[no_such_module]", "[../x]", "[5]"])
def test_imports_that_cannot_be(imports):
    with pytest.raises(ConfigError, match="imports to"):
        compose_plain(["recipe=tabular_w8a8", f"imports={imports}"])


def test_a_word_belongs_to_one_class():
    for word, kind in (("lsq", type("Other", (LSQ,), {})), ("new", MinMax), ("", Uniform)):
        with pytest.raises(ConfigError, match="expected"):
            register(word)(kind)
    assert register("lsq")(LSQ) is LSQ
    assert "new" not in QUANTIZERS
