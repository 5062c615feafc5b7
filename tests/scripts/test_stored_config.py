"""What stands beside or inside a file of somebody else runs nothing."""

import shutil

import pytest
import torch
import yaml

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
