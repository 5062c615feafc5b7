"""Inductor: int8 kernels form, predictions stay, and what it does not take is said in words."""

import logging
import platform
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch

from qat.errors import ExportError
from qat.export.agreement import compare_outputs
from qat.export.packed import save_packed
from qat.graph.convert import convert
from qat.models import build
from qat.reference.run import IntegerRun
from qat.runtimes.inductor import PATTERNS, InductorModel
from qat.spec import Rule
from tests.graph.test_convert import make
from tests.helpers import HAS_VNNI, folded, make_scheme, smooth_images, warm_up

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None
    or platform.machine().lower() not in ("x86_64", "amd64")
    or shutil.which("g++") is None,
    reason="needs torchao, an x86 processor and a C++ compiler",
)


def packed(model, scheme, x, path):
    captured, _ = folded(warm_up(model, x), scheme, x)
    converted = convert(captured)
    save_packed(converted, x, path, metadata={"name": "test"})
    return converted


@needs_torchao
def test_every_layer_becomes_an_int8_kernel(tmp_path):
    model, x = make("conv")
    converted = packed(model, make_scheme(4, 8), x, tmp_path / "m.safetensors")
    loaded = InductorModel(tmp_path / "m.safetensors", threads=1)
    assert loaded.metadata == {"name": "test"}
    assert loaded.input_shape == (4, 8, 8)
    assert loaded.integer_layers is None
    assert loaded(x).shape == (16, 5)
    assert loaded.integer_layers == 3
    agreement, difference = compare_outputs(IntegerRun(converted)(x), loaded(x))
    if HAS_VNNI:  # without it, oneDNN's kernels cut off sums of two products
        assert agreement == 1.0
        assert difference < 8


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_a_residual_network(bits, tmp_path):
    torch.manual_seed(0)
    x = smooth_images(32)
    converted = packed(build("resnet20", 10), make_scheme(*bits), x, tmp_path / "m.safetensors")
    loaded = InductorModel(tmp_path / "m.safetensors", threads=1)
    agreement, _ = compare_outputs(IntegerRun(converted)(x), loaded(x))
    assert loaded.integer_layers == 20
    assert agreement >= 0.95
    assert loaded(x[:3]).shape == (3, 10)


@needs_torchao
def test_nothing_but_float_layers_is_refused(tmp_path):
    model, x = make("conv")
    packed(model, make_scheme(8, 12), x, tmp_path / "m.safetensors")
    with pytest.raises(ExportError, match=r"got 3 .*first '0': an input of 12 bits at site 'inp"):
        InductorModel(tmp_path / "m.safetensors")


@needs_torchao
def test_a_float_layer_is_named(tmp_path, caplog):
    model, x = make("conv")
    rules = {"wide": Rule("3", {"bits": 16})}
    packed(model, make_scheme(rules=rules), x, tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING):
        InductorModel(tmp_path / "m.safetensors")
    assert "inductor computes '3' in float: weights of 16 bits" in caplog.text


def test_without_torchao(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setitem(sys.modules, PATTERNS, None)
    with pytest.raises(ExportError, match=r"pip install 'qat\[inductor\]'"):
        InductorModel(tmp_path / "m.safetensors")


def test_another_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(ExportError, match=r"expected an x86 processor .* got arm64"):
        InductorModel(tmp_path / "m.safetensors")
