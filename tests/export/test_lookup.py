"""Activations whose codes are looked up: comparisons in the file, the same codes everywhere."""

from functools import partial

import onnx
import pytest
import torch
from torch import nn

from qat.codecs import Lookup
from qat.export import runtime
from qat.export.onnx import export_onnx
from qat.export.onnx_file import write_onnx
from qat.export.packed import save_packed
from qat.export.runtime import OnnxModel
from qat.export.verify import compare_sites
from qat.fake_quant import activation_quants
from qat.graph.convert import convert
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from tests.helpers import folded, make_scheme, smooth_images, warm_up

BITS = {"apot": 4, "power_of_two": 3}


class Net(nn.Module):
    """Codes behind a ReLU, behind an addition, and moved between their table and their reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left, self.right = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = torch.cat([self.left(x), self.right(x) + x], 1).relu()
        return self.head(nn.functional.adaptive_max_pool2d(x, (1, 2)).flatten(1))


@pytest.fixture(params=BITS)
def exported(request, tmp_path):
    torch.manual_seed(0)
    x = smooth_images(32, 12)
    word = {"quantizer": request.param, "observer": "min_max"}
    scheme = make_scheme(8, BITS[request.param], activation=word)
    captured, _ = folded(warm_up(Net(), x), scheme, x)
    model = convert(captured)
    sites = export_onnx(model, x[:1], tmp_path / "m.onnx")
    return captured, model, x, sites, tmp_path


def test_every_site_has_its_table(exported):
    captured, model, *_ = exported
    tables = [m for m in model.modules() if isinstance(m, Lookup)]
    assert len(tables) == len(activation_quants(captured)) > 3


def test_codes_are_those_of_the_fold_stage_everywhere(exported):
    captured, model, x, sites, folder = exported
    reference = IntegerRun(captured)(x)
    assert torch.equal(IntegerRun(model)(x), reference)
    for optimise in (True, False):
        path, run = folder / "m.onnx", partial(IntegerRun, model)
        found = compare_sites(run, path, sites, x, optimise=optimise)
        assert {site.largest for site in found} == {0}
        torch.testing.assert_close(
            OnnxModel(path, optimise=optimise)(x), reference, rtol=1e-4, atol=1e-4
        )


def test_the_packed_file_holds_the_tables(exported):
    _, model, x, _, folder = exported
    save_packed(model, x[:1], folder / "m.safetensors", metadata={})
    assert torch.equal(PackedModel(folder / "m.safetensors")(x), IntegerRun(model)(x))


def test_weights_with_one_zero_point_are_still_refused(exported, caplog, monkeypatch):
    """Once this fails, ``workarounds._share_no_zero_points`` is no longer needed."""
    monkeypatch.setattr(runtime, "cuts_off_sums", lambda: True)  # also where there is VNNI
    *_, folder = exported
    proto = onnx.load(folder / "m.onnx")
    for node in proto.graph.node:
        if node.input[0] in ("left.weight_codes", "right.weight_codes"):
            node.input[2] = "stem.weight_zero_point"
    write_onnx(folder / "same.onnx", proto)
    OnnxModel(folder / "m.onnx")
    caplog.clear()
    OnnxModel(folder / "same.onnx")
    assert "sums may be cut off" in caplog.text
