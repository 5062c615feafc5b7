from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[3] / "scripts" / "benchmark"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # as Python does for a script


@pytest.fixture(scope="session")
def make_file(tmp_path_factory):
    """Export a float model to a file of its own."""

    def make(model, *inputs, dynamic=True):
        path = tmp_path_factory.mktemp("float") / "float.onnx"
        torch.onnx.export(
            model.eval(),
            inputs,
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
            external_data=False,
            verbose=False,
        )
        return path

    return make


@pytest.fixture(scope="session")
def float_file(make_file):
    return make_file(nn.Linear(4, 3), torch.randn(2, 4))
