"""Three networks at several widths on 1,000 images: every code of every site, every prediction."""

import functools

import pytest
import torch
import torchvision

from qat.export.agreement import compare_outputs
from qat.export.runtime import OnnxModel
from qat.export.verify import compare_sites
from qat.models import build
from qat.reference.run import IntegerRun
from qat.spec import Rule
from tests.export.conftest import LEARNED, export
from tests.helpers import make_scheme, smooth_images

COUNT = 1000
NETWORKS = {
    "resnet20": (lambda: build("resnet20", 10), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 64),
}
WIDTHS = [(8, 8, 8), (4, 8, 8), (4, 4, 8), (2, 2, 8), (2, 2, 2)]
"""Bits of weights, of what layers read, and of what additions read."""


@pytest.mark.slow
@pytest.mark.parametrize("bits", WIDTHS, ids=lambda b: "w{}a{}r{}".format(*b))
@pytest.mark.parametrize("name", NETWORKS)
def test_fold_stage_converted_and_file_make_the_same_codes(name, bits, tmp_path):
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    rules = {
        "residual": Rule("@to:add", None, {"bits": bits[2]}),
        "ends": Rule("@first|@last", {"bits": 8}, {"bits": 8}),
    }
    scheme = make_scheme(bits[0], bits[1], weight=LEARNED, activation=LEARNED, rules=rules)
    exported = export(make(), scheme, smooth_images(64, size), tmp_path / "model.onnx")
    run, model = functools.partial(IntegerRun, exported.model), OnnxModel(exported.path)
    for batch in smooth_images(COUNT, size).split(100):
        sites = compare_sites(run, exported.path, exported.sites, batch)
        assert {s.site: s.share for s in sites if s.share} == {}
        logits = IntegerRun(exported.captured)(batch)
        assert torch.equal(logits, IntegerRun(exported.model)(batch))
        assert compare_outputs(logits, model(batch)) == (1.0, 0.0)
