"""Hundreds of damaged and forged files: each is refused in one sentence, or computes as a model."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qat.errors import ExportError
from qat.export.onnx import export_onnx
from qat.export.onnx_file import write_onnx
from qat.export.packed import save_packed
from qat.export.packed_file import pack_file
from qat.export.runtime import OnnxModel
from qat.graph.convert import convert
from qat.runtimes.packed_model import PackedModel
from tests.helpers import folded, make_scheme, warm_up
from tests.mutations import VALUES, mutate, mutate_bytes

SECONDS = 20  # for one small file: far more than any needs, on a busy machine too


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with both files of a small model, and a batch."""
    torch.manual_seed(0)
    folder, x = tmp_path_factory.mktemp("exported"), torch.randn(4, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    captured, _ = folded(warm_up(net, x), make_scheme(4, 8), x)
    converted = convert(captured)
    save_packed(converted, x, folder / "m.safetensors", metadata={"name": "tiny"})
    export_onnx(converted, x, folder / "m.onnx", metadata={"name": "tiny"})
    return folder, x


def outcome(kind, path: Path, x) -> str | torch.Tensor:
    """Return the logits of a file, or why it is refused."""
    start = time.perf_counter()
    try:
        found = kind(path)(x)
    except ExportError as error:
        found = str(error)
    assert time.perf_counter() - start < SECONDS
    assert {file.name for file in path.parent.iterdir()} == {path.name}
    assert not isinstance(found, str) or (path.name in found and found.isprintable())
    return found


def forged_packed(exported, rng: random.Random) -> bytes:
    """Return a packed file as an attacker would write it: changed inside, its checksum right."""
    path = exported[0] / "m.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["qat"])
    tensors = load_file(path)
    if rng.random() < 0.3:
        name = rng.choice(sorted(tensors))
        tensors[name] = changed_tensor(tensors[name], rng)
    part = rng.choice(["graph", "graph", "graph", "weights", "input", None])
    changed = mutate(header if part is None else header[part], rng)
    return pack_file(tensors, changed if part is None else {**header, part: changed})


def changed_tensor(value, rng: random.Random):
    """Return another tensor: of another type, shape or content."""
    changes = [
        lambda: value.float() * float("nan"),
        lambda: value.float() * float("inf"),
        lambda: -value.float() - 1,
        lambda: value.flatten()[:-1],
        lambda: value[None],
        lambda: value.to(rng.choice([torch.float64, torch.int64, torch.bool, torch.bfloat16])),
        lambda: torch.zeros(0),
        lambda: torch.full_like(value, 120),
    ]
    return rng.choice(changes)().contiguous()


def forged_onnx(exported, rng: random.Random) -> onnx.ModelProto:
    """Return a model with one thing changed that a runtime reads."""
    model = onnx.load(exported[0] / "m.onnx")
    node, tensor = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
    values = onnx.numpy_helper.to_array(tensor)
    changes = [
        lambda: node.input.__delitem__(rng.randrange(len(node.input))),
        lambda: node.input.append(rng.choice(["", "input", "nothing"])),
        lambda: setattr(node, "op_type", rng.choice(["Loop", "If", "Add", "Tile", "X", "Resize"])),
        lambda: setattr(node, "domain", rng.choice(["x", "com.microsoft", "ai.onnx.ml"])),
        lambda: model.graph.node.remove(node),
        lambda: tensor.dims.__setitem__(slice(None), [rng.choice([0, 1, 2**40, -1, 3])]),
        lambda: setattr(tensor, "data_type", rng.randrange(25)),
        lambda: setattr(tensor, "name", rng.choice(["", "input", "x"])),
        lambda: tensor.CopyFrom(
            onnx.numpy_helper.from_array(
                np.full_like(values, rng.choice([0, 1, 100, np.nan]) if values.dtype.kind == "f"
                             else rng.choice([0, 1, 100])), tensor.name
            )
        ),
        model.graph.input[0].type.tensor_type.shape.dim.pop,
        model.graph.output.pop,
        model.opset_import.pop,
        lambda: setattr(model.opset_import[0], "version", rng.choice([0, 1, 7, 10**6])),
        lambda: setattr(model, "ir_version", rng.choice([0, 1, 10**6])),
        lambda: model.metadata_props.add(key="name", value=ascii(rng.choice(VALUES))),
        lambda: node.attribute.add(name=rng.choice(["axis", "to", "x"]), type=2, i=2**40),
    ]  # fmt: skip
    rng.choice(changes)()
    return model


def refusals(found) -> Counter[str]:
    return Counter(
        "runs" if isinstance(x, torch.Tensor) else x.split("got ")[1][:60] for x in found
    )


def run_packed(exported, folder: Path, count: int, seed: int) -> Counter[str]:
    path, rng = folder / "m.safetensors", random.Random(seed)
    found = []
    for _ in range(count):
        path.write_bytes(forged_packed(exported, rng))
        found.append(outcome(PackedModel, path, exported[1]))
    return refusals(found)


def run_onnx(exported, folder: Path, count: int, seed: int) -> Counter[str]:
    path, rng = folder / "m.onnx", random.Random(seed)
    found = []
    for _ in range(count):
        write_onnx(path, forged_onnx(exported, rng))
        found.append(outcome(OnnxModel, path, exported[1]))
    return refusals(found)


def run_damaged(exported, folder: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for kind, name in ((PackedModel, "m.safetensors"), (OnnxModel, "m.onnx")):
        whole = (exported[0] / name).read_bytes()
        sound = kind(exported[0] / name)(exported[1])
        path = folder / name.partition(".")[2] / name
        path.parent.mkdir()
        for _ in range(count):
            damaged = mutate_bytes(whole, rng)
            path.write_bytes(damaged)
            found = outcome(kind, path, exported[1])
            assert isinstance(found, str) or torch.equal(found, sound), "silent nonsense"


def test_forged_packed_files(exported, tmp_path):
    found = run_packed(exported, tmp_path, 150, seed=0)
    assert len(found) > 20  # most are refused, for many reasons
    assert found["runs"] < 75


def test_forged_onnx_files(exported, tmp_path):
    assert len(run_onnx(exported, tmp_path, 150, seed=0)) > 20


def test_damaged_files(exported, tmp_path):
    run_damaged(exported, tmp_path, 100, seed=0)
