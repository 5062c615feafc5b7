"""Sums of products in onnxruntime's integer kernels: exact, or cut off and made exact."""

import sys

import numpy as np
import onnxruntime
import pytest

from qat.export import runtime, sums
from qat.export.runtime import OnnxModel
from tests.helpers import HAS_VNNI

OPTION = "session.x64quantprecision"


@pytest.mark.skipif(sys.platform != "linux", reason="the processor's flags are read from /proc")
def test_a_kernel_knows_whether_its_processor_has_vnni():
    assert sums.cuts_off_sums() is not HAS_VNNI


def test_sums_are_exact_with_the_option_on_every_processor():
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(OPTION, "1")
    session = onnxruntime.InferenceSession(
        sums._product(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"codes": np.full((64, 64), 255, np.uint8)})
    assert np.unique(np.asarray(found)).tolist() == [64 * 255 * 127]


@pytest.mark.parametrize("cut_off", [True, False])
def test_the_option_is_set_only_where_sums_are_cut_off(cut_off, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "cuts_off_sums", lambda: cut_off)
    (tmp_path / "product.onnx").write_bytes(sums._product())
    options = OnnxModel(tmp_path / "product.onnx").session.get_session_options()
    assert options.get_session_config_entry(OPTION) == str(int(cut_off))
