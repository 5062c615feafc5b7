import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from qat.compose import read_config
from qat.data import DigitsData
from qat.export.runtime import OnnxModel


def weights(path):
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def test_a_finished_run_is_reproduced(image_run, call):
    status, out, error = call("export", image_run / "checkpoints" / "last.ckpt")
    assert (status, error) == (0, "")
    folder = image_run / "export-last"
    assert f"artifact and report in {folder}" in out
    assert "folded" not in out

    expected, got = weights(image_run / "model.onnx"), weights(folder / "model.onnx")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)
    x = torch.cat([x for x, _ in DigitsData().test_dataloader()])
    a, b = OnnxModel(image_run / "model.onnx"), OnnxModel(folder / "model.onnx")
    assert torch.equal(a(x), b(x))
    assert a.metadata == b.metadata
    packed = [path / "model.safetensors" for path in (image_run, folder)]
    assert packed[0].read_bytes() == packed[1].read_bytes()

    before, after = (json.loads((p / "report.json").read_text()) for p in (image_run, folder))
    for key in ("accuracy", "agreement", "size_bytes", "layers", "details"):
        assert after[key] == before[key]
    assert after["accuracy"]["float"] is not None
    assert before["seconds"].keys() == after["seconds"].keys()
    assert call("evaluate", folder / "model.onnx")[0] == 0  # its config.yaml lies beside it


def test_an_existing_model_stays_unless_forced(table_run, call, refuse, tmp_path):
    given = [table_run / "checkpoints" / "last.ckpt", "--out", tmp_path / "new" / "folder"]
    assert call("export", *given)[0] == 0
    model = tmp_path / "new" / "folder" / "model.onnx"
    model.write_text("precious")
    assert "overwrite it with --force" in refuse("export", *given)
    assert model.read_text() == "precious"
    assert call("export", *given, "--force")[0] == 0
    assert OnnxModel(model).metadata["name"] == "tabular_w8a8"
    assert "--force" in refuse("export", given[0], "--out", table_run)


def test_a_quantized_checkpoint_is_folded(early_checkpoint, call, tmp_path):
    status, out, _ = call("export", early_checkpoint(calibrated=True))
    assert status == 0
    assert "in phase quantize: froze its scales and folded" in out
    report = json.loads((tmp_path / "export-early" / "report.json").read_text())
    assert report["passed"]
    assert "float" not in report["accuracy"]  # the checkpoint does not know it


def test_a_float_checkpoint_is_refused(early_checkpoint, refuse, tmp_path):
    sentence = refuse("export", early_checkpoint(calibrated=False))
    assert "phase 'float': let the run go on" in sentence
    assert not (tmp_path / "export-early").exists()


def test_the_data_can_be_moved_but_the_model_cannot_be_changed(table_run, refuse, tmp_path):
    file = table_run / "checkpoints" / "last.ckpt"
    given = [file, "--out", tmp_path]
    refused = refuse("export", *given, "scheme=w4a4")
    assert "overrides of data, export, recipe, seed only" in refused
    assert "10 classes that" in refuse("export", *given, "+data.num_classes=5")
    assert "(10, 4) instead of (10, 192)" in refuse("export", *given, "data=digits")


def test_the_file_can_be_stored_in_another_way(early_checkpoint, call, tmp_path):
    path = early_checkpoint(calibrated=True)
    content = torch.load(path, weights_only=True)
    del content["hyper_parameters"]["config"]["export"]["storage"]  # of an older version
    rule = {"match": "*", "weight": {"bits": 4}}
    content["hyper_parameters"]["config"]["scheme"]["rules"]["narrow"] = rule
    torch.save(content, path)
    kinds = {}
    for name, given in {"speed": [], "size": ["export.storage=size"]}.items():
        folder = tmp_path / name
        options = ["export.threshold=0.9", "export.site_samples=8"]
        status, _, error = call("export", path, "--out", folder, *given, *options)
        assert (status, error) == (0, "")
        (weight,) = [i for i in onnx.load(folder / "model.onnx").graph.initializer
                     if i.name.endswith("weight_codes")]  # fmt: skip
        kinds[name] = weight.data_type
        config = read_config(folder / "config.yaml")["export"]
        assert config["storage"] == name
        assert (config["threshold"], config["site_samples"]) == (0.9, 8)
    assert kinds == {"speed": onnx.TensorProto.INT8, "size": onnx.TensorProto.INT4}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("export.storage=tiny", "export.storage to be speed or size, got 'tiny'"),
        ("export.threshold=high", "export.threshold to be a finite number from 0 to 1, got 'high'"),
        ("export.threshold=2", "from 0 to 1, got 2"),
        ("export.site_samples=0", "export.site_samples to be a whole number of at least 1, got 0"),
        ("+export.colour=red", "No key export.colour"),
        ("export.colour=red", "colour"),
        ("export=other", "the name of a export, got 'other'"),
    ],
)
def test_export_settings_that_make_no_sense(override, part, table_run, refuse, tmp_path):
    given = [table_run / "checkpoints" / "last.ckpt", "--out", tmp_path / "new"]
    assert part in refuse("export", *given, override)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.ones(2)}}, [1], torch.ones(2)])
def test_checkpoints_of_other_origin(content, refuse, tmp_path):
    torch.save(content, tmp_path / "other.ckpt")
    assert "without the config of a run" in refuse("export", tmp_path / "other.ckpt")


def test_wrong_files(table_run, unsafe_checkpoint, refuse, tmp_path):
    assert "got no file" in refuse("export", tmp_path / "none.ckpt")
    assert "cannot be read" in refuse("export", table_run / "model.onnx")
    assert "contains Python code" in refuse("export", unsafe_checkpoint)
    (tmp_path / "a_file").write_text("")
    assert "paths to read and write" in refuse(
        "export", table_run / "checkpoints" / "last.ckpt", "--out", tmp_path / "a_file"
    )


def test_a_checkpoint_of_a_changed_model(early_checkpoint, refuse):
    path = early_checkpoint(calibrated=True)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.extra"] = torch.ones(2)
    torch.save(content, path)
    assert "1 names that differ, first 'extra'" in refuse("export", path)
