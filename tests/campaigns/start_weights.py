"""Damaged, hostile and foreign files of start weights, each made from a good one and a seed."""

import io
import json
import os
import pickle
import random
import socket
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from qat.models import build

State = dict[str, Tensor]
Make = Callable[[Path], Path]
WEIGHT = "layer1.0.conv1.weight"
REFUSED, TAKEN, EITHER = "refused", "taken", "either"


def good() -> State:
    """Return the state dict that all files are made from."""
    torch.manual_seed(1)
    return build("resnet20", 10).state_dict()


def saved(content: Any, **options: Any) -> bytes:
    """Return what ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def files() -> dict[str, tuple[str, Make]]:
    """Return the campaign by name: how each file has to end, and what writes it."""
    forms = {
        "zip": (saved(good()), ".pt"),
        "legacy": (saved(good(), _use_new_zipfile_serialization=False), ".pth"),
        "safetensors": (save(good()), ".safetensors"),
    }
    return {
        **_truncated(forms),
        **_flipped(forms),
        **_of_another_kind(forms),
        **_contents(),
        **_safetensors_headers(forms["safetensors"][0]),
        **_archives(forms["zip"][0]),
        **_pickles(),
    }


def _file(content: bytes, suffix: str) -> Make:
    def make(folder: Path) -> Path:
        path = folder / f"weights{suffix}"
        path.write_bytes(content)
        return path

    return make


def _truncated(forms: dict[str, tuple[bytes, str]]) -> dict[str, tuple[str, Make]]:
    found = {}
    for form, (content, suffix) in forms.items():
        for keep in (1, 7, 64, 600, 0.1, 0.5, 0.9, 0.999, -22, -1):
            size = keep % len(content) if isinstance(keep, int) else int(keep * len(content))
            found[f"{form} cut to {keep}"] = REFUSED, _file(content[:size], suffix)
    return found


def _flipped(forms: dict[str, tuple[bytes, str]]) -> dict[str, tuple[str, Make]]:
    """Flip bits where the structure is: headers, pickles, tables of contents; some in tensors."""
    places = random.Random(17)
    found = {}
    for form, (content, suffix) in forms.items():
        size = table = len(content)
        if form == "zip":
            table = content.rindex(b"PK\x06\x06")
            spans = [(0, 200, 4), (200, 9000, 8), (table - 9000, table, 8), (table, size, 8)]
        else:
            spans = [(0, 200, 6), (200, 7000, 8)]
        for start, end, times in [*spans, (10_000, size - 10_000, 3)]:
            for _ in range(times):
                place, bit = places.randrange(max(0, start), end), places.randrange(8)
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                in_tensors = form == "zip" and 64 < place < table - 9000  # has checksums
                end_ = REFUSED if in_tensors else EITHER
                found[f"{form} bit {bit} of byte {place}"] = end_, _file(bytes(changed), suffix)
    return found


def _of_another_kind(forms: dict[str, tuple[bytes, str]]) -> dict[str, tuple[str, Make]]:
    def npz(write: Callable[..., None]) -> bytes:
        stream = io.BytesIO()
        write(stream, np.zeros(3))
        return stream.getvalue()

    def tar() -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                archive.addfile(tarfile.TarInfo(name))
        return stream.getvalue()

    def script() -> bytes:
        stream = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
        return stream.getvalue()

    contents = {
        "nothing": b"",
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(2000),
        "npy": npz(np.save),
        "npz": npz(np.savez),
        "gzip": b"\x1f\x8b" + bytes(500),
        "GGUF": b"GGUF" + bytes(500),
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "tar": tar(),
        "TorchScript": script(),
        "ONNX": b"\x08\x07\x12\x07pytorch" + bytes(3000),
        "text": b"weights\n" * 50,
        "JSON": json.dumps({"weight": [1, 2, 3]}).encode(),
        "pickle": pickle.dumps({"weight": np.zeros(3)}),
        "pickle of numbers": pickle.dumps({"weight": [1.0]}, protocol=2),
        "noise": random.Random(3).randbytes(5000),
        "zeros": bytes(5000),
    }
    kinds = {f"{name} as .pt": (REFUSED, _file(c, ".pt")) for name, c in contents.items()}
    kinds |= {
        f"{n} as .safetensors": (REFUSED, _file(contents[n], ".safetensors"))
        for n in ("nothing", "npz", "text", "JSON", "noise", "zeros")
    }
    kinds["safetensors as .pt"] = TAKEN, _file(forms["safetensors"][0], ".pt")
    kinds["zip as .safetensors"] = REFUSED, _file(forms["zip"][0], ".safetensors")
    return kinds | {name: (REFUSED, make) for name, make in SPECIAL.items()}


def _pipe(folder: Path) -> Path:
    os.mkfifo(path := folder / "weights.pt")
    return path


def _socket(folder: Path) -> Path:
    path = folder / "weights.pt"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def _link(target: str) -> Make:
    def make(folder: Path) -> Path:
        (path := folder / "weights.pt").symlink_to(target)
        return path

    return make


SPECIAL: dict[str, Make] = {
    "folder": lambda folder: folder,
    "pipe": _pipe,
    "pipe as .safetensors": lambda folder: _pipe(folder).rename(folder / "weights.safetensors"),
    "socket": _socket,
    "device": _link("/dev/zero"),
    "link to itself": _link("weights.pt"),
    "link to nothing": _link("nowhere.pt"),
    "name too long": lambda folder: folder / ("a" * 300),
    "name with NUL": lambda folder: folder / "a\0b",
    "name with newline": lambda folder: folder / "a\nb\x1b[31m.pt",
    "name with surrogate": lambda folder: folder / "a\udc80.pt",
    "below a file": lambda folder: _file(b"", ".pt")(folder) / "x.pt",
}


class Code:
    """Pickles as a call that leaves a mark in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("code-was-run"),)


class _Bytes:
    """Pickles as 2**40 bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (2**40,)


def _nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = dict(good())
    for _ in range(depth):
        content = {"model": content}
    return content


def _circle() -> dict[str, Any]:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    return content


class _Shadowed:
    """Pickles as an OrderedDict whose methods are hidden behind numbers."""

    def __reduce__(self) -> tuple[Any, ...]:
        hidden = dict.fromkeys(("items", "keys", "values", "get", "copy"), 5)
        return OrderedDict, (), hidden, None, iter(good().items())


def _contents() -> dict[str, tuple[str, Make]]:
    """Return things that ``torch.save`` writes and that are, or are not, start weights."""
    state = good()
    weight = state[WEIGHT]

    def with_(value: Any, name: str = WEIGHT) -> dict[str, Any]:
        return {**state, name: value}

    def at(value: float, name: str = WEIGHT) -> dict[str, Any]:
        tensor = state[name].clone().double()
        tensor.view(-1)[3] = value
        return with_(tensor, name)

    module = build("resnet20", 10)
    refused: dict[str, Any] = {
        "NaN": at(float("nan")),
        "infinity": at(float("inf")),
        "minus infinity in a bias": at(-float("inf"), "linear.bias"),
        "too large for float32": at(1e300),
        "negative variance": at(-1.0, "bn1.running_var"),
        "NaN variance": at(float("nan"), "bn1.running_var"),
        "int8 weight": with_((weight * 100).to(torch.int8)),
        "uint8 weight": with_((weight * 100).to(torch.uint8)),
        "int64 weight": with_(weight.long()),
        "bool weight": with_(weight > 0),
        "complex weight": with_(weight.to(torch.complex64)),
        "sparse weight": with_(weight.to_sparse()),
        "CSR weight": with_(state["linear.weight"].to_sparse_csr(), "linear.weight"),
        "quantized weight": with_(torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)),
        "meta weight": with_(weight.to("meta")),
        "meta model": {name: value.to("meta") for name, value in state.items()},
        "nested tensor": with_(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "huge view of one number": with_(torch.zeros(1).as_strided((2**40,), (0,))),
        "huge mask": with_(torch.zeros(1).as_strided((2**40,), (0,)), f"{WEIGHT}_mask"),
        "mask of another shape": with_(torch.ones(3), f"{WEIGHT}_mask"),
        "NaN mask": with_(weight * float("nan"), f"{WEIGHT}_mask"),
        "empty weight": with_(torch.zeros(0)),
        "0-d weight": with_(torch.tensor(1.0)),
        "turned weight": with_(state["linear.weight"].T, "linear.weight"),
        "list for a tensor": with_(weight.tolist()),
        "number for a tensor": with_(1.0),
        "text for a tensor": with_("weights"),
        "None for a tensor": with_(None),
        "numbers only": {"weight": 1.0, "bias": 0.0},
        "list of tensors": list(state.values()),
        "tuple": tuple(state.items()),
        "a tensor": weight,
        "a number": 5,
        "a text": "weights\nof\x1b[31m mine",
        "None": None,
        "empty dict": {},
        "empty state dict": {"state_dict": {}},
        "keys are numbers": dict(enumerate(state.values())),
        "keys are tuples": {(n, i): v for i, (n, v) in enumerate(state.items())},
        "keys are tensors": {torch.ones(50, 50): 1, torch.ones(3): 2},
        "key with escapes": {f"{n}\x1b[31m\n": v for n, v in state.items()},
        "key with surrogate": with_(weight, "a\udc80"),
        "key of a megabyte": with_(weight, "a" * 10**6),
        "nested 300 times": _nested(300),
        "a circle": _circle(),
        "optimizer only": torch.optim.SGD(module.parameters(), 0.1, momentum=0.9).state_dict(),
        "extra tensor": with_(weight, "conv9.weight"),
        "missing tensor": {n: v for n, v in state.items() if n != WEIGHT},
        "other classes": build("resnet20", 100).state_dict(),
        "other model": build("resnet32", 10).state_dict(),
        "GAN of two": {"generator": state, "discriminator": {n: v + 1 for n, v in state.items()}},
        "whole module": module,
        "module in a dict": {"model": module, "epoch": 3},
        "code": {"state_dict": state, "hook": Code()},
        "a class": {"state_dict": state, "class": Code},
        "a function": {"state_dict": state, "function": os.system},
        "NumPy arrays": {n: v.numpy() for n, v in state.items()},
        "2**40 bytes": {"state_dict": state, "extra": _Bytes()},
    }
    names = {n: f"module.{n}" for n in state}
    taken: dict[str, Any] = {
        "requires grad": {n: torch.nn.Parameter(v) if v.is_floating_point() else v
                          for n, v in state.items()},
        "half": {n: v.half() if v.is_floating_point() else v for n, v in state.items()},
        "bfloat16": {n: v.bfloat16() if v.is_floating_point() else v for n, v in state.items()},
        "double": {n: v.double() if v.is_floating_point() else v for n, v in state.items()},
        "expanded bias": with_(torch.zeros(1).expand(10), "linear.bias"),
        "strided weight": with_(torch.cat([weight, weight])[::2]),
        "one storage for two": with_(weight.view(-1).view_as(weight)),
        "prefix 2000 times": {f"{'model.' * 2000}{n}": v for n, v in state.items()},
        "NumPy scalar beside": {"state_dict": state, "accuracy": np.float64(0.9)},
        "prefix": {names[n]: v for n, v in state.items()},
        "nested five times": _nested(5),
        "shadowed methods": _Shadowed(),
        "counters are missing": {n: v for n, v in state.items() if "num_batches" not in n},
        "Lightning": {"state_dict": {f"net.{n}": v for n, v in state.items()}, "epoch": 3,
                      "pytorch-lightning_version": "2.0", "hyper_parameters": {"lr": 0.1}},
    }  # fmt: skip
    return {
        **{name: (REFUSED, _saves(content)) for name, content in refused.items()},
        **{name: (TAKEN, _saves(content)) for name, content in taken.items()},
    }


def _saves(content: Any) -> Make:
    return _file(saved(content), ".pt")


def _safetensors_headers(content: bytes) -> dict[str, tuple[str, Make]]:
    """Replace the header, or fields of one tensor in it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    first, last = (f(header, key=lambda n: header[n]["data_offsets"]) for f in (min, max))

    def raw(text: bytes, says: int | None = None) -> Make:
        size = struct.pack("<Q", len(text) if says is None else says)
        return _file(size + text + data, ".safetensors")

    def changed(name: str, **fields: Any) -> Make:
        return raw(json.dumps({**header, name: {**header[name], **fields}}).encode())

    end = header[last]["data_offsets"][1]
    makes = {
        "length 2**63": raw(b"{}", 2**63),
        "length 0": raw(b"", 0),
        "length too large": raw(json.dumps(header).encode(), len(content) * 2),
        "length too small": raw(json.dumps(header).encode(), 40),
        "no JSON": raw(b"{not json at all"),
        "a list": raw(b"[1, 2, 3]"),
        "no UTF-8": raw(b'{"\xff\xfe": 1}'),
        "deep": raw(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        "empty": raw(b"{}"),
        "unknown type": changed(first, dtype="F1024"),
        "no type": changed(first, dtype=None),
        "float8": changed(first, dtype="F8_E8M0"),
        "half of the bytes": changed(first, dtype="F16"),
        "whole numbers": changed(WEIGHT, dtype="I32"),
        "negative shape": changed(first, shape=[-1]),
        "huge shape": changed(first, shape=[2**62, 2**62]),
        "shape of text": changed(first, shape=["a"]),
        "fractional shape": changed(first, shape=[0.5]),
        "offsets past the end": changed(last, data_offsets=[0, 2**50]),
        "offsets turned": changed(last, data_offsets=[end, 0]),
        "offsets overlap": changed(last, data_offsets=header[first]["data_offsets"]),
        "negative offsets": changed(first, data_offsets=[-8, 8]),
    }
    return {f"safetensors header: {name}": (REFUSED, make) for name, make in makes.items()}


def _archives(content: bytes) -> dict[str, tuple[str, Make]]:
    """Rewrite the zip archive that ``torch.save`` made."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    table = next(name for name in entries if name.endswith("data.pkl"))
    tensor = max(entries, key=lambda name: len(entries[name]))

    def rewritten(changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> Make:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, data in {**entries, **changes}.items():
                if data is not None:
                    archive.writestr(name, data)
        return _file(stream.getvalue(), ".pt")

    pickled = entries[table]
    size = len(entries[tensor]) // 4
    number = struct.pack("<H", size)  # as the pickle holds it
    places = random.Random(5)

    def noisy() -> bytes:
        changed = bytearray(pickled)
        for _ in range(3):
            changed[places.randrange(len(changed))] = places.randrange(256)
        return bytes(changed)

    makes = {
        "without pickle": (REFUSED, rewritten({table: None})),
        "without a tensor": (REFUSED, rewritten({tensor: None})),
        "tensor cut": (REFUSED, rewritten({tensor: entries[tensor][:-8]})),
        "tensor empty": (REFUSED, rewritten({tensor: b""})),
        "pickle empty": (REFUSED, rewritten({table: b""})),
        "pickle cut": (REFUSED, rewritten({table: pickled[:-300]})),
        "pickle of numbers": (REFUSED, rewritten({table: pickle.dumps([1, 2], protocol=2)})),
        "sizes lie": (REFUSED, rewritten({table: pickled.replace(number, b"\xff\xff")})),
        "compressed": (EITHER, rewritten({}, zipfile.ZIP_DEFLATED)),
        "big-endian": (EITHER, rewritten({table.replace("data.pkl", "byteorder"): b"big"})),
        "byte order unknown": (REFUSED, rewritten({table.replace("data.pkl", "byteorder"): b"x"})),
        "bomb": (REFUSED, _bomb(entries, tensor)),
    }
    makes |= {f"pickle with noise {i}": (EITHER, rewritten({table: noisy()})) for i in range(25)}
    return {f"archive: {name}": make for name, make in makes.items()}


def _bomb(entries: dict[str, bytes], tensor: str) -> Make:
    """Write an archive whose table says that a tensor unpacks to 4 TB."""

    def make(folder: Path) -> Path:
        path = folder / "weights.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
            archive.getinfo(tensor).file_size = 2**42
        return path

    return make


def _pickles() -> dict[str, tuple[str, Make]]:
    """Return files in the format before archives, with storages that do not exist or are huge."""
    content = saved(good(), _use_new_zipfile_serialization=False)
    makes = {
        "huge storage": content.replace(struct.pack("<H", 36864), b"\xff\xff"),
        "other magic": content.replace(b"\xa8\x50\x19", b"\xa8\x51\x19", 1),
        "calls a function": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueR.",
        "builds bytes": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "endless stack": b"\x80\x02" + b"(" * 10**6 + b".",
        "deep list": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        "huge text": b"\x80\x02X\xff\xff\xff\x7f" + b"a" * 100 + b".",
        "huge number": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + b".",
        "shared lists": b"\x80\x02]q\x00" + b"(h\x00h\x00eq\x00" * 60 + b".",
    }
    return {f"pickle: {name}": (REFUSED, _file(data, ".pt")) for name, data in makes.items()}
