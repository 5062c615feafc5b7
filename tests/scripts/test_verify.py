import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qat.export.onnx_file import write_onnx


@pytest.fixture
def copy(table_run, tmp_path):
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(table_run, tmp_path / "run")


def change_codes(path):
    proto = onnx.load(path)
    weight = next(i for i in proto.graph.initializer if i.name.endswith("weight_codes"))
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    write_onnx(path, proto)


def test_a_run_passes(call, table_run, tmp_path):
    status, output, _ = call("verify", table_run, "--json", tmp_path / "proof.json")
    assert status == 0
    assert "passed" in output
    found = json.loads((tmp_path / "proof.json").read_text())
    report = json.loads((table_run / "report.json").read_text())
    for key in ("passed", "agreement", "first_difference", "sites", "largest_sums", "float_ops"):
        assert found[key] == report[key]
    for kind in found["accuracy"]:
        assert found["accuracy"][kind] == report["accuracy"][kind]
        assert kind == "fake_quant" or kind in found["agreement"]
        assert kind in output


def test_another_runtime_is_asked_too(call, refuse, table_run, tmp_path):
    pytest.importorskip("openvino")
    given = ["--runtime", "openvino", "--json", tmp_path / "proof.json"]
    assert call("verify", table_run, *given)[0] == 0
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["agreement"]["openvino"] >= 0.99
    assert "choose of onnxruntime, openvino" in refuse("verify", table_run, "--runtime", "chip")


def test_pytorch_predicts_the_same_from_the_packed_file(call, table_run, tmp_path):
    given = ["--runtime", "torch", "--json", tmp_path / "proof.json"]
    assert call("verify", table_run, *given)[0] == 0
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["agreement"]["torch"] == found["agreement"]["converted"] == 1.0
    assert found["difference"]["torch"] == found["difference"]["converted"]


def test_the_file_itself_and_other_data(call, table_run):
    assert call("verify", table_run / "model.onnx", "data.batch_size=7")[0] == 0


def test_an_export_is_compared_with_its_checkpoint(call, copy):
    assert call("export", copy / "checkpoints" / "best.ckpt")[0] == 0
    assert call("verify", copy / "export-best")[0] == 0


def test_a_changed_weight_is_found_where_it_is(refuse, image_run, tmp_path):
    run = shutil.copytree(image_run, tmp_path / "run")
    change_codes(run / "model.onnx")
    error = refuse("verify", run, "--json", tmp_path / "proof.json")
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["passed"] is False
    assert found["agreement"]["onnxruntime"] < 0.999
    assert "expected onnxruntime to agree" in error
    assert f"first at site '{found['first_difference']}'" in error
    kept = np.load(run / "first_difference.npz")
    assert (kept["codes:model"] != kept["codes:file"]).any()
    assert len(kept.files) > 2


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_a_damaged_file_is_named(refuse, copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-200])
    assert name in refuse("verify", copy)


def test_no_checkpoint(refuse, table_run, tmp_path):
    shutil.copy(table_run / "model.onnx", tmp_path)
    assert "--checkpoint" in refuse("verify", tmp_path / "model.onnx")
    last = table_run / "checkpoints" / "last.ckpt"
    assert "model.safetensors" in refuse("verify", tmp_path, "--checkpoint", last)
