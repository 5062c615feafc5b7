"""ExecuTorch: integer layers in XNNPACK, the same predictions, refusals before a file exists."""

import logging
import sys
from importlib.util import find_spec

import pytest
import torch
import torchvision
from torch import nn

from qat.errors import ExportError
from qat.export.agreement import compare_outputs
from qat.export.executorch import export_executorch
from qat.graph.convert import convert
from qat.models import build
from qat.reference.run import IntegerRun
from qat.runtimes.executorch import ExecutorchModel
from tests.graph.test_convert import make
from tests.helpers import folded, make_scheme, smooth_images, warm_up

needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None, reason="executorch is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of executorch and coremltools, about themselves


def converted(model, scheme, x):
    return convert(folded(warm_up(model, x), scheme, x)[0])


@needs_executorch
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_layers_compute_on_integers(bits, tmp_path, caplog):
    model, x = make("conv")
    integer, path = converted(model, make_scheme(*bits), x), tmp_path / "m.pte"
    with caplog.at_level(logging.WARNING):
        found = export_executorch(integer, x, path, metadata={"name": "test"})
    assert found == ["0", "3"]
    assert "XNNPACK computes '7' in float: a result that is not quantized" in caplog.text
    loaded = ExecutorchModel(path, threads=1)
    assert loaded.metadata == {"name": "test"}
    assert loaded.input_shape == (4, 8, 8)
    agreement, difference = compare_outputs(IntegerRun(integer)(x), loaded(x))
    assert agreement == 1.0
    assert difference < 8


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize(
    "build_model",
    [
        lambda: build("resnet20", 10),  # its shortcuts are slices, which XNNPACK has no form for
        lambda: torchvision.models.mobilenet_v2(num_classes=10),
        lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10),
    ],
    ids=["resnet20", "mobilenet_v2", "vit"],
)
def test_whole_networks(build_model, tmp_path):
    torch.manual_seed(0)
    model, x = build_model(), smooth_images(16)
    for head in [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]:
        nn.init.normal_(head.weight)
    integer = converted(model, make_scheme(), x)
    export_executorch(integer, x, tmp_path / "m.pte", metadata={})
    agreement, _ = compare_outputs(IntegerRun(integer)(x), ExecutorchModel(tmp_path / "m.pte")(x))
    assert agreement >= 0.9


@needs_executorch
@pytest.mark.parametrize(
    ("net", "scheme", "message"),
    [
        ("conv", make_scheme(8, 12), "at most 8 bits for XNNPACK, got 12 at site 'input.input'"),
        ("conv", make_scheme(16), "got 3 that it has none for, first '0': weights of 16 bits"),
        ("conv", make_scheme(weight={"group_size": 2}), "first '0': several weight scales"),
    ],
)
def test_what_xnnpack_cannot_take_is_refused_before_a_file_exists(net, scheme, message, tmp_path):
    model, x = make(net)
    with pytest.raises(ExportError) as error:
        export_executorch(converted(model, scheme, x), x, tmp_path / "m.pte", metadata={})
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@needs_executorch
def test_damaged_file(tmp_path):
    (tmp_path / "m.pte").write_bytes(b"no program")
    with pytest.raises(ExportError, match=r"that ExecuTorch runs, got '.*m\.pte'"):
        ExecutorchModel(tmp_path / "m.pte")


def test_without_executorch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(ExportError, match=r"pip install 'qat\[executorch\]'"):
        ExecutorchModel(tmp_path / "m.pte")


@needs_executorch
def test_missing_file(tmp_path):
    with pytest.raises(ExportError, match=r"none at '.*m\.pte'.*scripts/lower\.py"):
        ExecutorchModel(tmp_path / "m.pte")
