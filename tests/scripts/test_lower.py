import json

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of executorch and coremltools, about themselves


def test_a_run_is_lowered_from_its_packed_file_and_verified(call, image_run, tmp_path):
    pytest.importorskip("executorch")
    target = image_run / "model.pte"
    status, out, _ = call("lower", image_run)
    assert status == 0
    assert f"19 of 20 layers compute on integers; wrote {target}" in out
    given = ["--runtime", "executorch", "--json", tmp_path / "proof.json"]
    assert call("verify", image_run, *given)[0] == 0
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["agreement"]["executorch"] >= 0.98
    assert torch.tensor(found["difference"]["executorch"]).isfinite()


def test_a_file_that_is_missing(refuse, tmp_path):
    assert "none.safetensors" in refuse("lower", tmp_path / "none.safetensors")
