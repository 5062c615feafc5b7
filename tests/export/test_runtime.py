"""Runtimes that read ONNX behind one interface: what they are told, tell and refuse."""

import importlib.util
import sys

import onnxruntime
import pytest
import torch
from torch import nn

from qat.errors import ConfigError, ExportError
from qat.export import runtime
from qat.export.agreement import compare_outputs
from qat.export.runtime import OnnxModel
from qat.models import build
from qat.runtimes.openvino import OpenVinoModel
from qat.runtimes.table import RUNTIMES, find_runtime
from tests.export.conftest import LEARNED, export
from tests.helpers import HAS_VNNI, make_scheme, smooth_images

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
NAMES = ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]


class Plain(nn.Module):
    """Convolutions in a row, without a residual addition."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, stride=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    scheme = make_scheme(weight=LEARNED, activation=LEARNED)
    return export(Plain(), scheme, smooth_images(64), tmp_path_factory.mktemp("plain") / "m.onnx")


@pytest.mark.parametrize("name", NAMES)
def test_interface(name, plain):
    model = find_runtime(name)(plain.path, threads=1)
    assert isinstance(model, RUNTIMES[name])
    assert model.metadata == {"classes": ["a", "b"], "seed": 3}
    assert model.input_shape == (3, 32, 32)
    for batch in (1, 5):
        assert model(plain.x[:batch]).shape == (batch, 10)


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_damaged_files(name, tmp_path, capfd):
    load = find_runtime(name)
    with pytest.raises(ExportError, match=r"none at '.*none\.onnx'"):
        load(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    with pytest.raises(ExportError, match=r"runs, got '.*broken\.onnx'"):
        load(broken)
    assert capfd.readouterr() == ("", "")


def integer_convolutions(model: OpenVinoModel) -> int:
    nodes = [op.get_rt_info() for op in model.compiled.get_runtime_model().get_ops()]
    facts = [(n["layerType"].astype(str), n["runtimePrecision"].astype(str)) for n in nodes]
    return facts.count(("Convolution", "u8"))


@needs_openvino
def test_openvino_computes_integers_close_to_onnxruntime(plain):
    model = OpenVinoModel(plain.path, threads=1)
    assert integer_convolutions(model) == 2
    agreement, difference = compare_outputs(OnnxModel(plain.path)(plain.x), model(plain.x))
    if HAS_VNNI:  # without it, OpenVINO's kernels cut off sums of two products
        assert agreement == 1.0
        assert difference < 2  # a code of the features may turn where its value lies at a tie


@pytest.mark.slow
@needs_openvino
def test_openvino_predicts_with_residual_additions(exported_resnet20):
    """Every convolution is integer; additions lose one rounding, and codes drift from there."""
    exported = exported_resnet20(8, 8)
    model = OpenVinoModel(exported.path, threads=1)
    assert integer_convolutions(model) == 19
    agreement, _ = compare_outputs(OnnxModel(exported.path)(exported.x), model(exported.x))
    assert agreement >= 0.95


@needs_openvino
def test_openvino_keeps_float_models_in_float32(tmp_path):
    model = build("linear", 4, in_features=64).eval()
    x = torch.randn(16, 64)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        model, (x,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=dynamic, verbose=False
    )
    loaded = OpenVinoModel(tmp_path / "m.onnx")
    torch.testing.assert_close(loaded(x), model(x))  # bfloat16 would be 3e-3 away
    assert loaded.metadata == {}


def test_runtime_that_is_not_installed(monkeypatch, plain):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportError, match=r"pip install 'qat\[openvino\]'"):
        OpenVinoModel(plain.path)


def test_unknown_runtime():
    with pytest.raises(
        ConfigError, match="got 'openvin': choose of onnxruntime, openvino, torch, "
    ):
        find_runtime("openvin")


def test_options_reach_onnxruntime(plain):
    for threads, expected in ((2, 2), (None, 0)):  # 0: as many as there are
        options = OnnxModel(plain.path, threads=threads).session.get_session_options()
        assert options.intra_op_num_threads == expected
    with pytest.raises(ExportError, match=r"CPUExecutionProvider.* got NoSuchProvider: choose"):
        OnnxModel(plain.path, providers=["NoSuchProvider"])


@pytest.mark.parametrize(("message", "tries"), [(f"at {runtime._SHARED} it fails", 2), ("no", 1)])
def test_sums_are_cut_off_only_where_the_file_runs_in_no_other_way(
    message, tries, plain, monkeypatch, caplog
):
    make, seen = onnxruntime.InferenceSession, []

    def fail_once(content, options, providers):
        seen.append(options.get_session_config_entry(runtime._EXACT_SUMS))
        if len(seen) == 1:
            raise RuntimeError(message)
        return make(content, options, providers=providers)

    monkeypatch.setattr(runtime, "cuts_off_sums", lambda: True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail_once)
    if tries == 2:
        assert OnnxModel(plain.path)(plain.x).shape == plain.logits.shape
    else:
        with pytest.raises(ExportError, match=r"RuntimeError \(no\)"):
            OnnxModel(plain.path)
    assert seen == ["1", "0"][:tries]
    assert ("sums may be cut off" in caplog.text) is (tries == 2)
