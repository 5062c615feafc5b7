"""Predictions with hostile files, models, options and states: a sentence each, and nothing lost.

What is refused how is printed: ``pytest -s -m slow tests/campaigns/test_predictions.py``.
"""

import hashlib
import json
import random
import shutil
import sys

import numpy as np
import pytest
from onnx import TensorProto

from qat.terminal import escape
from tests.campaigns.hostile_inputs import archives, arrays, images, others
from tests.predictions import CLASSES, FACTS, SHAPE, make_model, predict

pytestmark = pytest.mark.slow
KINDS = ("csv", "json", "jsonl", "parquet")
STRANGER = b"the only copy"


def tell(name, result):
    """Print how a case ended."""
    line = (result.error.splitlines() or result.out.splitlines() or [""])[0]
    sys.stdout.write(f"{result.status} {escape(str(name))}: {escape(line)[:150]}\n")


def contents(folder):
    """Return the bytes of every file in a folder."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model.onnx")


@pytest.fixture
def hostile(tmp_path):
    """A folder of a hundred and more hostile files, and the paths of all."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name, content in {**images(), **arrays(), **archives()}.items():
        (folder / name).write_bytes(content)
    others(folder)
    return folder, sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_inputs(model, hostile, tmp_path):
    _, paths = hostile
    assert len(paths) > 130
    for path in paths:
        result = predict(model, path, "--crop" if path.suffix != ".npy" else "--top=2")
        tell(path.name, result)
        assert result.is_fine, result.error
        assert "\x1b" not in result.out + result.error
        assert "nan" not in result.out.partition(": ")[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:This DataLoader")
def test_all_of_them_at_once(workers, model, hostile, tmp_path):
    folder, paths = hostile
    given = [path for path in paths if path.is_file() and path.suffix in (".npy", ".npz")]
    out = tmp_path / "out.csv"
    result = predict(model, folder, *given, "--workers", workers, "--csv", out, seconds=120)
    assert (result.status, result.is_fine) == (0, True), result.error
    state = json.loads((tmp_path / "out.csv.state.json").read_text(encoding="utf-8"))
    assert state["predicted"] == len(result.out.splitlines())
    assert result.error.count("left out ") > 90
    assert predict(model, folder, *given, "--csv", out, "--resume").error == result.error


def models(folder):
    """Make models that are none, or say of themselves what cannot be; return their paths."""
    whole = make_model(folder / "whole.onnx").read_bytes()
    made = {f"cut_{n}": whole[:n] for n in (0, 1, 50, len(whole) // 2, len(whole) - 1)}
    made |= {"text": b"no model", "zeros": b"\0" * 999}
    made |= {f"flip_{n}": whole[:n] + b"\xff" + whole[n + 1 :] for n in range(0, 300, 20)}
    for name, content in made.items():
        (folder / f"{name}.onnx").write_bytes(content)
    facts = {
        "classes": [None, "cat", 5, [], ["a"], [1, 2, 3, 4], {"a": 1}, list("abcde"), [None] * 4],
        "mean": ["0.5", 0.5, [], [0.5, 0.5], [None], ["a"], [True], [float("nan")], [10**400]],
        "std": [[0], [-1], [float("inf")], [1e-46], [0.1] * 4, {}, False, [[0.1]], [1e400]],
    }
    for key, values in facts.items():
        for i, value in enumerate(values):
            make_model(folder / f"{key}_{i}.onnx", {**FACTS, key: value})
        make_model(folder / f"without_{key}.onnx", {k: v for k, v in FACTS.items() if k != key})
    for name, how in {
        "two_inputs": {"inputs": 2},
        "two_outputs": {"outputs": 2},
        "tokens": {"kind": TensorProto.INT64},
        "no_sizes": {"shape": (3, "H", "W")},
        "huge": {"shape": (3, 100_000, 8)},
        "infinite": {"scale": np.inf},
        "channels_2": {"shape": (2, 8, 8)},
    }.items():
        make_model(folder / f"{name}.onnx", **how)
    (folder / "folder.onnx").mkdir()
    return sorted(folder.iterdir())


def test_hostile_models(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, *SHAPE), np.float32))
    (tmp_path / "models").mkdir()
    for path in models(tmp_path / "models"):
        result = predict(path, tmp_path / "x.npy")
        tell(path.name, result)
        assert result.is_fine, result.error
        assert result.status == 1 or path.stem == "whole" or path.stem.startswith("flip_")


def checksum(state):
    """Let a state look as if it had been written so."""
    state = {key: value for key, value in state.items() if key != "checksum"}
    text = json.dumps(state, sort_keys=True)
    signed = {**state, "checksum": hashlib.sha256(text.encode()).hexdigest()}
    return dump(signed)


def dump(state):
    return json.dumps(state, indent=1) + "\n"


def edits(text, rng):
    """Yield name and bytes of states that somebody edited; half of them have a right checksum."""
    state = json.loads(text)
    values = [None, True, False, -1, 0, 1, 2**62, 2**70, 1.5, "1", "", [], {}, "0" * 64, 1e999]
    for key in state:
        yield f"without {key}", checksum({k: v for k, v in state.items() if k != key}).encode()
        for value in rng.sample(values, 4):
            edited = {**state, key: value}
            signed = rng.random() < 0.5 and key != "checksum"
            yield f"{key}={value}", (checksum(edited) if signed else dump(edited)).encode()
    for change in (1, -1):
        for key in ("batches", "predicted", "size", "unreadable"):
            yield f"{key}+{change}", checksum({**state, key: state[key] + change}).encode()
    options = state["options"]
    for value in ({}, {**options, "x": 1}, {**options, "top": True}, {**options, "batch": "2"}):
        yield f"options={value}", checksum({**state, "options": value}).encode()
    yield "more", checksum({**state, "more": 1}).encode()
    yield "finished", dump({**state, "finished": not state["finished"]}).encode()
    yield "finished, nothing", checksum({**state, "finished": True, "size": 0}).encode()
    whole = text.encode()
    yield from {
        "empty": b"",
        "NUL": b"\0" * 99,
        "cut": whole[:-20],
        "UTF-16": text.encode("utf-16"),
        "BOM": b"\xef\xbb\xbf" + whole,
        "latin": b"\xff" + whole,
        "list": b"[]",
        "deep": b"[" * 50_000,
        "long": whole + b" " * 2**20,
        "digits": b'{"batches": ' + b"9" * 6000 + b"}",
        "twice": whole.replace(b'"batches"', b'"batches": 1, "batches"', 1),
    }.items()


@pytest.fixture
def begun(model, tmp_path):
    """Begin an output, or finish it; return the command, the folder and what a whole one holds."""
    x = np.random.default_rng(0).normal(size=(23, *SHAPE)).astype(np.float32)
    x[::5] = np.nan
    np.save(tmp_path / "x.npy", x)

    def begin(kind, *, stop_after, folder="out", batch=2):
        (tmp_path / folder).mkdir(exist_ok=True)
        out = tmp_path / folder / "table"
        given = [model, tmp_path / "x.npy", "--batch", batch, f"--{kind}", out, "--top", 4096]
        predict(*given, stop_after=stop_after)
        return given, tmp_path / folder

    return begin


@pytest.mark.parametrize("kind", KINDS)
def test_edited_states(kind, begun, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    rng, tried = random.Random(kind), 0
    begun(kind, stop_after=None, folder="whole")
    whole = contents(tmp_path / "whole")
    for stop_after in (9, None):
        given, folder = begun(kind, stop_after=stop_after, folder=f"stopped_{stop_after}")
        before = contents(folder)
        original = (folder / "table.state.json").read_text(encoding="utf-8")
        for name, content in edits(original, rng):
            tried += 1
            _put(folder, {**before, "table.state.json": content, "mine.csv": STRANGER})
            edited = contents(folder)
            result = predict(*given, "--resume")
            tell(f"{kind}, {stop_after}, {name}", result)
            assert result.is_fine, result.error
            if result.status == 1:
                assert contents(folder) == edited
                result = predict(*given, "--force")
                assert result.is_fine, result.error
            after = contents(folder)
            assert after.pop("mine.csv") == STRANGER
            if result.status == 0:
                assert after == whole, name
            else:
                assert contents(folder) == edited
    sys.stdout.write(f"{tried} states of {kind}\n")
    assert tried > 150


def _put(folder, files):
    """Let a folder hold these files and no others."""
    shutil.rmtree(folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_edited_outputs(kind, begun, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    begun(kind, stop_after=None, folder="whole")
    whole = contents(tmp_path / "whole")
    given, folder = begun(kind, stop_after=9)
    before = contents(folder)
    for name, content in before.items():
        if name.endswith("state.json") or not content:
            continue
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for edit in (None, b"", content[:-1], flipped, b"x" + content):
            files = {**before, name: edit}
            _put(folder, {key: value for key, value in files.items() if value is not None})
            edited = contents(folder)
            result = predict(*given, "--resume")
            tell(f"{kind}, {name}", result)
            assert (result.status, result.is_fine) == (1, True), result.error
            assert contents(folder) == edited
        _put(folder, {**before, name: content + b"left by a kill"})
        assert predict(*given, "--resume").status == (1 if kind == "parquet" and "/" in name else 0)
        if kind != "parquet":
            assert contents(folder) == whole


def test_hostile_options(model, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, *SHAPE), np.float32))
    huge = "9" * 30
    for option in ("--top", "--batch", "--workers"):
        for value in ("-1", "0", "1.5", "nan", "", " ", huge, "9" * 5000, "\x1b[2J", "\u0661"):
            result = predict(model, tmp_path / "x.npy", f"{option}={value}")
            tell(f"{option}={value[:40]}", result)
            assert result.is_fine, result.error
            shown = result.status == 0
            assert len(result.out.splitlines()) == (3 if shown else 0)
    assert predict(model, tmp_path / "x.npy", "--top", huge).out.count("%") == 3 * len(CLASSES)
