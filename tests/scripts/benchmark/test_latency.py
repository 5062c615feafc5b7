"""The whole script on tiny files: what it measures, compares and writes; never how long it took."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from qat.errors import ExportError
from qat.export.runtime import OnnxModel
from qat.models import build, load_checkpoint

SCRIPT = "benchmark/latency"
QUICK = ["--threads", "1", "--seconds", "0.01", "--rounds", "2", "--batch", "1,3"]
NAMES = [
    pytest.param("onnxruntime", marks=pytest.mark.slow),
    pytest.param(
        "openvino",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed"),
        ],
    ),
]


@pytest.fixture
def measure(call, tmp_path):
    """Run the script, quickly; returns what it wrote and what it printed."""

    def run(*arguments):
        target = tmp_path / "found.json"
        status, out, error = call(SCRIPT, *arguments, *QUICK, "--json", target)
        assert (status, error) == (0, "")
        return json.loads(target.read_text()), out

    return run


@pytest.mark.parametrize("runtime", NAMES)
def test_a_run_with_its_float_model_and_static_quantization(runtime, table_run, measure):
    found, out = measure(table_run, "--static", "--runtime", runtime)
    assert found["rounds"] == 2
    assert found["machine"]["threads"] == 1
    assert runtime in found["machine"]["versions"]
    in_float, artifact, static = found["files"]
    assert [f["kind"] for f in found["files"]] == ["float", "artifact", "static"]
    assert in_float["reference"] is None
    assert artifact["reference"] == static["reference"] == in_float["file"]
    assert artifact["size_bytes"] == (table_run / "model.onnx").stat().st_size
    for file in found["files"]:
        assert file["runtime"] == runtime
        assert file["load_seconds"] > 0
        assert file["peak_bytes"] > 0
        assert list(file["batches"]) == ["1", "3"]
        for figures in file["batches"].values():
            assert 0 < figures["median_ms"] <= figures["p99_ms"]
            assert figures["throughput"] > 0
            assert figures["calls"] >= 2
            assert len(figures["round_medians_ms"]) == 2
            ratio = figures["times_as_fast"]
            assert (ratio is None) == (file is in_float)
            assert ratio is None or ratio["low"] <= ratio["median"] <= ratio["high"]
        assert out.count(f"│ {runtime} ") == 6
    assert "1 of" in out.splitlines()[0]


@pytest.mark.slow
def test_pytorch_runs_the_packed_files_of_run_and_float_model(table_run, measure):
    found, _ = measure(table_run, "--static", "--runtime", "torch")
    in_float, artifact = found["files"]  # what onnxruntime quantizes is for onnxruntime
    assert (in_float["kind"], artifact["kind"]) == ("float", "artifact")
    assert artifact["reference"] == in_float["file"]
    assert artifact["size_bytes"] == (table_run / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_files_alone_are_compared_with_the_first_or_with_one_that_is_named(
    table_run, float_file, measure, tmp_path
):
    a, b = (shutil.copy(table_run / "model.onnx", tmp_path / name) for name in ("a.onnx", "b.onnx"))
    found, _ = measure(a, b)
    assert [f["reference"] for f in found["files"]] == [None, str(a)]
    found, _ = measure(a, b, "--float", float_file)
    name = f"{float_file} (float)"
    assert [(f["kind"], f["reference"]) for f in found["files"]] == [
        ("float", None),
        ("artifact", name),
        ("artifact", name),
    ]


@pytest.mark.slow
def test_runs_of_one_architecture_share_its_float_file(table_run, tmp_path):
    other = shutil.copytree(table_run, tmp_path / "other")
    (tmp_path / "made").mkdir()
    collect = import_module("collection").collect
    found = collect([table_run, other / "model.onnx"], tmp_path / "made", None, static=False)
    shared = f"{table_run} (float)"
    assert [(s.name, s.reference) for s in found] == [
        (shared, None),
        (str(table_run), shared),
        (str(other / "model.onnx"), shared),
    ]
    x = torch.randn(5, 4)
    model = build("linear", 10, in_features=4)
    load_checkpoint(model, table_run / "checkpoints" / "best.ckpt")
    torch.testing.assert_close(OnnxModel(found[0].path)(x), model(x))


@pytest.mark.slow
def test_static_file_is_quantized(make_file, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten())
    path = make_file(model, torch.randn(2, 3, 8, 8))
    collect = import_module("collection").collect
    in_float, _, static = collect([path], tmp_path, path, static=True)
    assert static.shape == in_float.shape == (3, 8, 8)
    assert static.size_bytes < in_float.size_bytes / 2
    x = static.batch(4)
    assert torch.equal(x, in_float.batch(4))
    gap = (OnnxModel(static.path)(x) - (y := OnnxModel(in_float.path)(x))).abs().max()
    assert 0 < gap < 0.05 * (y.max() - y.min())


class Recorder:
    """Takes note of when it is asked."""

    def __init__(self, name, asked):
        self.name, self.asked = name, asked

    def measure(self, batch, seconds):
        self.asked.append((self.name, batch, seconds))
        return [seconds]


def test_files_take_turns_after_warming_up(load_script):
    asked = []
    workers = [Recorder(name, asked) for name in "ab"]
    times = load_script(SCRIPT).measure(workers, [1, 8], rounds=2, seconds=24.0)
    assert asked == [(name, batch, 2.0) for batch in (1, 8) for name in "ababab"]
    assert times == {(w, batch): [[2.0], [2.0]] for w in workers for batch in (1, 8)}


@pytest.mark.slow
def test_memory_is_that_of_the_file(make_file):
    subject = import_module("subject").read_subject
    worker = import_module("worker").Worker
    ballast = b"x" * 300_000_000  # of the parent, which the kernel's own count hands on
    peaks = []
    for width in (4, 4000):
        file = subject("m", "float", make_file(nn.Linear(width, width), torch.randn(2, width)))
        process = worker(file, "onnxruntime", 1)
        assert len(process.measure(2, 0.0)) == 1
        peaks.append(process.peak_bytes())
        process.close()
        assert process.process.exitcode == 0
    small, large = peaks
    assert 0 < small < len(ballast) / 2
    assert large - small > 4000 * 4000 * 4 * 0.9  # nearly all of its float32 weights


def test_process_that_dies(float_file):
    subject = import_module("subject").read_subject("m.onnx", "float", float_file)
    worker = import_module("worker").Worker(subject, "onnxruntime", 1)
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(ExportError, match=r"'m\.onnx' to run .*exit status -9"):
        worker.measure(1, 0.0)
    worker.close()


def test_wrong_files(refuse, tmp_path, make_file):
    assert f"none at '{tmp_path / 'no.onnx'}'" in refuse(SCRIPT, tmp_path / "no.onnx")
    assert f"none at '{tmp_path / 'model.onnx'}'" in refuse(SCRIPT, tmp_path)
    (text := tmp_path / "text.onnx").write_text("no model")
    assert "an ONNX model that onnxruntime runs" in refuse(SCRIPT, text)
    pair = make_file(nn.Bilinear(2, 2, 2), torch.randn(2, 2), torch.randn(2, 2), dynamic=False)
    assert "with one input" in refuse(SCRIPT, pair)
    fixed = make_file(nn.Linear(4, 3), torch.randn(1, 4), dynamic=False)
    assert "a batch of 3" in refuse(SCRIPT, fixed, *QUICK)


def test_wrong_options(refuse, call, float_file, table_run, tmp_path, monkeypatch):
    assert "'tensorrt': choose of onnxruntime, openvino" in refuse(
        SCRIPT, float_file, "--runtime", "onnxruntime,tensorrt"
    )
    assert "a float file for --static" in refuse(SCRIPT, float_file, "--static")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "qat[notebooks]" in refuse(SCRIPT, float_file, "--plot", tmp_path / "a.png")
    for wrong in (["--batch", "0"], ["--batch", "1,x"], ["--threads", "0"], ["--seconds", "nan"]):
        assert call(SCRIPT, float_file, *wrong)[0] == 2


@pytest.mark.slow
def test_run_without_what_its_float_model_needs(table_run, refuse, tmp_path):
    folder = shutil.copytree(table_run, tmp_path / "run")
    (folder / "config.yaml").write_text("data: 1\nseed: 1\n")
    assert "--float FILE.onnx" in refuse(SCRIPT, folder)


@pytest.mark.slow
def test_plot(measure, float_file, tmp_path, refuse):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    measure(float_file, "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "rename it" in refuse(SCRIPT, float_file, *QUICK, "--plot", tmp_path / "a.nosuch")


def test_help_shows_an_example_without_loading_torch():
    script = Path(__file__).parents[3] / "scripts" / f"{SCRIPT}.py"
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"python scripts/{SCRIPT}.py " in done.stdout
    assert "torch" not in done.stderr
