"""Damaged, hostile and odd data sets, and values under ``data`` that make no sense."""

import io
import os
import random
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Node = dict[str, Any]
Make = Callable[[Path], Node]
REFUSED, TAKEN, EITHER = "refused", "taken", "either"
SMALL = {"batch_size": 4}


def sets() -> dict[str, tuple[str, Make]]:
    """Return the campaign by name: how each set has to end, and what writes it."""
    return {
        **_arrays(),
        **_array_files(),
        **_folders(),
        **_images(),
        **_texts(),
        **_cifar(),
        **_values(),
    }


def arrays() -> dict[str, np.ndarray]:
    """Return a good set: 40 images of 8 x 8 pixels in 10 classes, and 10 for the test."""
    draw = np.random.default_rng(0)
    return {
        "x_train": draw.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 10,
        "x_test": draw.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(10),
    }


def _node(path: Path, **values: Any) -> Node:
    return {"_target_": "qat.data.ArraysData", "path": str(path), **SMALL, **values}


def _npz(changes: dict[str, Any], **values: Any) -> Make:
    def make(folder: Path) -> Node:
        content = {k: v for k, v in {**arrays(), **changes}.items() if v is not None}
        np.savez(folder / "a.npz", **content)
        return _node(folder / "a.npz", **values)

    return make


def _features(x: np.ndarray, **values: Any) -> Make:
    return _npz({"x_train": x, "x_test": x[:10]}, augment="none", **values)


def _arrays() -> dict[str, tuple[str, Make]]:
    """Return arrays that are stored well and hold something odd."""
    good = arrays()
    y, x = good["y_train"], np.random.default_rng(1).normal(size=(40, 6))
    structured = np.zeros(40, dtype=[("a", "i4"), ("b", "f4")])

    def at(value: Any, dtype: Any = np.float64) -> np.ndarray:
        changed = x.astype(dtype)
        changed[3, 2] = value
        return changed

    def label(value: Any) -> np.ndarray:
        changed = y.astype(np.int64)
        changed[3] = value
        return changed

    refused = {
        **{f"without {key}": _npz({key: None}) for key in good},
        "labels negative": _npz({"y_train": label(-1)}),
        "labels most negative": _npz({"y_train": label(-(2**63))}),
        "labels 2**62": _npz({"y_train": label(2**62), "y_test": label(2**62)[:10]}),
        "labels uint64": _npz({"y_train": y.astype(np.uint64) + np.uint64(2**63)}),
        "labels with a gap": _npz({"y_train": label(99999), "y_test": label(99999)[:10]}),
        "labels float": _npz({"y_train": y.astype(float)}),
        "labels NaN": _npz({"y_train": np.full(40, np.nan)}),
        "labels bool": _npz({"y_train": y > 4, "y_test": good["y_test"] > 4}),
        "labels text": _npz({"y_train": y.astype(str)}),
        "labels one-hot": _npz({"y_train": np.eye(10, dtype=int)[y]}),
        "labels a column": _npz({"y_train": y[:, None]}),
        "labels 0-d": _npz({"y_train": np.array(3)}),
        "labels complex": _npz({"y_train": y.astype(complex)}),
        "labels dates": _npz({"y_train": y.astype("datetime64[D]")}),
        "labels objects": _npz({"y_train": np.array([None] * 40)}),
        "labels structured": _npz({"y_train": structured}),
        "labels more than samples": _npz({"y_train": np.tile(y, 2)}),
        "labels fewer than samples": _npz({"y_train": y[:30]}),
        "one class": _npz({"y_train": y * 0, "y_test": y[:10] * 0}),
        "one class with a name": _npz(
            {"y_train": y * 0, "y_test": y[:10] * 0, "class_names": np.array(["a"])}
        ),
        "test has other classes": _npz({"y_test": y[:10] + 5}),
        "no samples": _npz({"x_train": good["x_train"][:0], "y_train": y[:0]}),
        "one sample": _npz({"x_train": good["x_train"][:1], "y_train": y[:1]}),
        "no test samples": _npz({"x_test": good["x_test"][:0], "y_test": y[:0]}),
        "inputs 0-d": _npz({"x_train": np.array(3.0)}),
        "inputs 1-d": _npz({"x_train": x[:, 0]}),
        "inputs without features": _features(x[:, :0]),
        "inputs without height": _npz({"x_train": good["x_train"][:, :0]}),
        "inputs without channels": _npz(
            {"x_train": good["x_train"][..., :0], "x_test": good["x_test"][..., :0]}
        ),
        "inputs NaN": _features(at(np.nan)),
        "inputs infinite": _features(at(np.inf)),
        "inputs too large for float32": _features(at(1e300)),
        "inputs float16 infinite": _features(at(np.inf, np.float16)),
        "inputs complex": _features(x.astype(complex)),
        "inputs bool": _features(x > 0),
        "inputs int64": _features((x * 100).astype(int)),
        "inputs uint16": _npz({"x_train": good["x_train"].astype(np.uint16)}),
        "inputs int8": _npz({"x_train": good["x_train"].astype(np.int8)}),
        "inputs text": _npz({"x_train": good["x_train"].astype(str)}),
        "inputs objects": _npz({"x_train": np.array([None, "a"])}),
        "inputs structured": _npz({"x_train": structured}),
        "inputs bytes": _npz({"x_train": np.array([b"a"] * 40)}),
        "images without channels": _npz({"x_train": good["x_train"][..., 0]}),
        "images channels first": _npz(
            {k: good[k].transpose(0, 3, 1, 2) for k in ("x_train", "x_test")}
        ),
        "images of two sizes": _npz({"x_test": good["x_test"][:, :7]}),
        "train uint8, test float": _npz({"x_test": good["x_test"].transpose(0, 3, 1, 2) / 255}),
        "names twice": _npz({"class_names": np.array(["a"] * 10)}),
        "names too few": _npz({"class_names": np.array(["a", "b"])}),
        "names empty": _npz({"class_names": np.array(["", *list("abcdefghi")])}),
        "names with escapes": _npz({"class_names": np.array(["\x1b[31m", *list("abcdefghi")])}),
        "names with newlines": _npz({"class_names": np.array(["a\nb", *list("abcdefghi")])}),
        "names objects": _npz({"class_names": np.array([None] * 10)}),
        "names float": _npz({"class_names": np.arange(10.0)}),
        "names 0-d": _npz({"class_names": np.array("a")}),
        "names no UTF-8": _npz({"class_names": np.array([bytes([200 + i]) for i in range(10)])}),
        "mean too short": _npz({}, mean=[0.5]),
        "mean NaN": _npz({}, mean=[0.5, float("nan"), 0.5]),
        "mean text": _npz({}, mean="imagenet"),
        "mean a number": _npz({}, mean=0.5),
        "std zero": _npz({}, std=[1, 0, 1]),
        "std negative": _npz({}, std=[1, -1, 1]),
        "std infinite": _npz({}, std=[1, 1, float("inf")]),
        "crops of features": _npz({"x_train": x, "x_test": x[:10]}),
        "augment unknown": _npz({}, augment="flip"),
        "augment a number": _npz({}, augment=5),
        "augment a list": _npz({}, augment=["crop"]),
    }
    taken = {
        "good": _npz({}),
        "names as bytes": _npz({"class_names": np.array([b"%d" % i for i in range(10)])}),
        "names as numbers": _npz({"class_names": np.arange(10)}),
        "float16": _features(x.astype(np.float16)),
        "long double": _features(x.astype(np.longdouble)),
        "big-endian": _features(x.astype(">f4")),
        "Fortran order": _features(np.asfortranarray(x)),
        "big-endian labels": _npz({"y_train": y.astype(">i8")}),
        "uint8 labels": _npz({"y_train": y.astype(np.uint8)}),
        "fewer than a batch": _npz({}, batch_size=1000),
        "more in the file": _npz({"objects": np.array([None]), "notes": np.array("text")}),
        "one pixel": _npz({k: arrays()[k][:, :1, :1] for k in ("x_train", "x_test")}),
    }
    return {
        **{f"arrays: {name}": (REFUSED, make) for name, make in refused.items()},
        **{f"arrays: {name}": (TAKEN, make) for name, make in taken.items()},
    }


def _raw(content: bytes) -> Make:
    def make(folder: Path) -> Node:
        (folder / "a.npz").write_bytes(content)
        return _node(folder / "a.npz")

    return make


def _array_files() -> dict[str, tuple[str, Make]]:
    """Return files that are no archive of arrays, or a damaged or hostile one."""
    plain, packed = io.BytesIO(), io.BytesIO()
    np.savez(plain, **arrays())
    np.savez_compressed(packed, **arrays())
    contents = {"plain": plain.getvalue(), "packed": packed.getvalue()}
    makes: dict[str, tuple[str, Make]] = {}
    for form, content in contents.items():
        for keep in (0, 1, 30, 200, len(content) // 2, len(content) - 22, len(content) - 1):
            makes[f"{form} cut to {keep}"] = REFUSED, _raw(content[:keep])
        places = random.Random(7)
        table = content.index(b"PK\x01\x02")
        for start, end in [(0, 200)] * 8 + [(table, len(content))] * 8 + [(300, table)] * 4:
            changed = bytearray(content)
            place, bit = places.randrange(start, end), places.randrange(8)
            changed[place] ^= 1 << bit
            makes[f"{form} bit {bit} of byte {place}"] = EITHER, _raw(bytes(changed))
    one = io.BytesIO()
    np.save(one, np.zeros(3))
    makes |= {
        "npy": (REFUSED, _raw(one.getvalue())),
        "text": (REFUSED, _raw(b"x,y\n1,2\n" * 100)),
        "encrypted": (REFUSED, _raw(_flagged(contents["plain"]))),
        "twice": (REFUSED, _twice),
        "zip without arrays": (REFUSED, _header(None)),
        "shape lies": (REFUSED, _header({"shape": (2**40, 8, 8, 3)})),
        "shape overflows": (REFUSED, _header({"shape": (2**62, 4)})),
        "shape negative": (REFUSED, _header({"shape": (-1, 8, 8, 3)})),
        "shape of text": (REFUSED, _header({"shape": "abc"})),
        "type of objects": (REFUSED, _header({"descr": "|O"})),
        "type unknown": (REFUSED, _header({"descr": "|Q9"})),
        "type of 2 GB": (REFUSED, _header({"descr": "|V2000000000"})),
        "header calls": (REFUSED, _header("__import__('os').system('touch code-was-run')")),
        "header deep": (REFUSED, _header("(" * 3000)),
        "bomb": (REFUSED, _bomb),
        "folder": (REFUSED, _node),
        "missing": (REFUSED, lambda folder: _node(folder / "no.npz")),
        "pipe": (REFUSED, _pipe),
        "device": (REFUSED, _link("/dev/zero")),
        "link to itself": (REFUSED, _link("a.npz")),
        "name too long": (REFUSED, lambda folder: _node(folder / ("a" * 300))),
        "name with NUL": (REFUSED, lambda folder: _node(folder / "a\0b")),
        "path a number": (REFUSED, lambda folder: {**_node(folder), "path": 5}),
        "path a list": (REFUSED, lambda folder: {**_node(folder), "path": ["a"]}),
        "path empty": (REFUSED, lambda folder: {**_node(folder), "path": ""}),
    }
    return {f"npz: {name}": make for name, make in makes.items()}


def _flagged(content: bytes) -> bytes:
    """Return an archive that says it is encrypted."""
    changed = bytearray(content)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = changed.find(mark)
        while place >= 0:
            changed[place + offset] |= 1
            place = changed.find(mark, place + 1)
    return bytes(changed)


def _write(folder: Path, members: list[tuple[str, bytes]]) -> Node:
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(f"{name}.npy", content)
    return _node(folder / "a.npz")


def _members() -> list[tuple[str, bytes]]:
    found = []
    for name, array in arrays().items():
        np.save(stream := io.BytesIO(), array)
        found.append((name, stream.getvalue()))
    return found


def _twice(folder: Path) -> Node:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _write(folder, [*_members(), _members()[0]])


def _header(fields: dict[str, Any] | str | None) -> Make:
    """Replace the header of ``x_train``, or fields of it; None leaves all arrays out."""

    def make(folder: Path) -> Node:
        if fields is None:
            return _write(folder, [("notes", b"none")])
        members = dict(_members())
        header = {"descr": "|u1", "fortran_order": False, "shape": (40, 8, 8, 3)}
        text = fields if isinstance(fields, str) else repr({**header, **fields})
        packed = text.encode().ljust(118) + b"\n"
        members["x_train"] = (
            b"\x93NUMPY\x01\x00" + struct.pack("<H", len(packed)) + packed + bytes(40 * 192)
        )
        return _write(folder, list(members.items()))

    return make


def _bomb(folder: Path) -> Node:
    """Write an archive of a few kB whose table says that an array unpacks to 4 TB."""
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _members():
            archive.writestr(f"{name}.npy", content)
        archive.getinfo("x_train.npy").file_size = 2**42
    return _node(folder / "a.npz")


def _pipe(folder: Path) -> Node:
    os.mkfifo(folder / "a.npz")
    return _node(folder / "a.npz")


def _link(target: str) -> Make:
    def make(folder: Path) -> Node:
        (folder / "a.npz").symlink_to(target)
        return _node(folder / "a.npz")

    return make


def tree(folder: Path, classes: tuple[str, ...] = ("a", "b"), count: int = 3) -> None:
    """Write a good folder of images."""
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (20, 20), (80 * number, 30 * i, 5))
                image.save(folder / part / name / f"{i}.png")


def _folder_node(folder: Path, **values: Any) -> Node:
    return {"_target_": "qat.data.FolderData", "root": str(folder), "size": 8, **SMALL, **values}


def _tree(change: Callable[[Path], Any], **values: Any) -> Make:
    def make(folder: Path) -> Node:
        tree(folder)
        change(folder)
        return _folder_node(folder, **values)

    return make


def _many(folder: Path) -> None:
    for part in ("train", "val"):
        for i in range(1500):
            (folder / part / f"c{i}").mkdir()
            os.link(folder / part / "a" / "0.png", folder / part / f"c{i}" / "0.png")


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def _rename_both(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for part in ("train", "val"):
            (folder / part / "b").rename(folder / part / name)

    return change


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _folders() -> dict[str, tuple[str, Make]]:
    """Return trees of folders that are odd; each is made from a good one."""
    refused: dict[str, Callable[[Path], Any]] = {
        "nothing": lambda f: (_remove(f / "train"), _remove(f / "val")),
        "without train": lambda f: _remove(f / "train"),
        "without val": lambda f: _remove(f / "val"),
        "train is a file": lambda f: (_remove(f / "train"), (f / "train").touch()),
        "train is a pipe": lambda f: (_remove(f / "train"), os.mkfifo(f / "train")),
        "train links to itself": lambda f: (
            _remove(f / "train"),
            (f / "train").symlink_to("train"),
        ),
        "other classes": lambda f: (f / "val" / "b").rename(f / "val" / "c"),
        "more classes to train": lambda f: (f / "train" / "c").mkdir(),
        "one class": lambda f: (_remove(f / "train" / "b"), _remove(f / "val" / "b")),
        "no class": lambda f: [_remove(f / p / c) for p in ("train", "val") for c in "ab"],
        "empty class": lambda f: [p.unlink() for p in (f / "train" / "b").iterdir()],
        "no image suffix": lambda f: [p.rename(f"{p}.x") for p in (f / "train" / "b").iterdir()],
        "pipe with image suffix": lambda f: os.mkfifo(f / "train" / "a" / "z.jpg"),
        "socket with image suffix": lambda f: _bind(f / "train" / "a" / "z.JPG"),
        "device with image suffix": lambda f: (f / "val" / "a" / "z.png").symlink_to("/dev/zero"),
        "link to nothing": lambda f: (f / "train" / "a" / "z.png").symlink_to("nowhere"),
        "link to itself": lambda f: (f / "train" / "a" / "z.png").symlink_to("z.png"),
        "links in a circle": lambda f: (f / "train" / "a" / "loop").symlink_to(".."),
        "many links in circles": lambda f: [
            (f / "train" / "a" / f"loop{i}").symlink_to(".") for i in range(30)
        ],
        "one folder twice": lambda f: [(f / p / "c").symlink_to("a") for p in ("train", "val")],
        "class with newline": _rename_both("b\nc"),
        "class with escape": _rename_both("\x1b[31mred"),
        "class with surrogate": _rename_both("b\udcff"),
    }
    taken: dict[str, Callable[[Path], Any]] = {
        "good": lambda f: None,
        "hidden folder": lambda f: (f / "train" / ".ipynb_checkpoints").mkdir(),
        "pipe without image suffix": lambda f: os.mkfifo(f / "train" / "a" / "z"),
        "file between classes": lambda f: (f / "train" / "README.txt").touch(),
        "name with newline": lambda f: (f / "train" / "a" / "0.png").rename(
            f / "train" / "a" / "0\n\x1b.png"
        ),
        "name with surrogate": lambda f: (f / "train" / "a" / "0.png").rename(
            f / "train" / "a" / "0\udcff.png"
        ),
        "class of other letters": _rename_both("Größe"),
        "images further down": lambda f: (
            (f / "train" / "a" / "more").mkdir(),
            (f / "train" / "a" / "0.png").rename(f / "train" / "a" / "more" / "0.png"),
        ),
        "part named test": lambda f: (f / "val").rename(f / "test"),
        "thousands of classes": _many,
        "link to an image elsewhere": lambda f: (f / "train" / "a" / "z.png").symlink_to("0.png"),
    }
    return {
        **{f"folder: {name}": (REFUSED, _tree(change)) for name, change in refused.items()},
        **{f"folder: {name}": (TAKEN, _tree(change)) for name, change in taken.items()},
    }


def _image(write: Callable[[Path], Any], name: str = "1.png") -> Make:
    return _tree(lambda folder: write(folder / "train" / "a" / name), val_fraction=0, batch_size=6)


def _mode(mode: str, suffix: str) -> Make:
    image = Image.fromarray((np.arange(400).reshape(20, 20) * 150).astype(np.uint16))
    if mode != "I;16":
        image = Image.new(mode, (20, 20))
    return _image(image.save, f"z{suffix}")


def _cut(share: float, suffix: str) -> Make:
    def write(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return _image(write, f"z{suffix}")


def _png_of(width: int, height: int) -> Make:
    """Write a PNG whose header alone says how large it is."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
    )
    return _image(lambda path: path.write_bytes(content + chunk(b"IEND", b"")))


def _images() -> dict[str, tuple[str, Make]]:
    """Return good trees with one odd image."""
    refused = {
        "empty": _image(lambda path: path.write_bytes(b"")),
        "text": _image(lambda path: path.write_bytes(b"no image")),
        "zeros": _image(lambda path: path.write_bytes(bytes(1000))),
        "cut PNG": _cut(0.5, ".png"),
        "cut JPEG": _cut(0.5, ".jpg"),
        "cut WebP": _cut(0.5, ".webp"),
        "cut TIFF": _cut(0.5, ".tif"),
        "cut to the head": _cut(0.02, ".jpg"),
        "decompression bomb": _png_of(60_000, 60_000),
        "decompression warning": _png_of(10_000, 10_000),
        "no pixels": _png_of(0, 0),
        "16 bits": _mode("I;16", ".png"),
        "32 bits": _mode("I", ".tif"),
        "floats": _mode("F", ".tif"),
        "narrow": _image(lambda path: Image.new("RGB", (3_000_000, 1)).save(path)),
        "folder": _image(lambda path: (path.unlink(), path.mkdir(), (path / "x.png").touch())),
    }
    taken = {
        **{f"mode {mode}": _mode(mode, ".png") for mode in ("1", "L", "LA", "P", "RGBA")},
        "mode CMYK": _mode("CMYK", ".jpg"),
        "GIF": _mode("P", ".bmp"),
        "JPEG named PNG": _image(lambda path: Image.new("RGB", (9, 9)).save(path, "JPEG")),
        "one pixel": _image(lambda path: Image.new("RGB", (1, 1)).save(path)),
    }
    return {
        **{f"image: {name}": (REFUSED, make) for name, make in refused.items()},
        **{f"image: {name}": (TAKEN, make) for name, make in taken.items()},
    }


def _text(contents: dict[str, bytes], **values: Any) -> Make:
    def make(folder: Path) -> Node:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return {
            "_target_": "qat.data.TextData",
            "root": str(folder),
            "pattern": "*.txt",
            "context": 16,
            **SMALL,
            **values,
        }

    return make


def _texts() -> dict[str, tuple[str, Make]]:
    """Return folders of text."""
    words = {f"{i}.txt": b"the quick brown fox jumps over it\n" * 20 for i in range(3)}

    def odd(change: Callable[[Path], Any], **values: Any) -> Make:
        def make(folder: Path) -> Node:
            node = _text(words, **values)(folder)
            change(folder / "9.txt")
            return node

        return make

    refused = {
        "no files": _text({}),
        "one file": _text({"a.txt": b"a" * 500}),
        "empty files": _text({"a.txt": b"", "b.txt": b""}),
        "one byte": _text({"a.txt": b"a", "b.txt": b"b"}),
        "shorter than the context": _text({"a.txt": b"a" * 16, "b.txt": b"b" * 500}),
        "huge context": _text(words, context=10**9),
        "pipe": odd(os.mkfifo),
        "socket": odd(_bind),
        "device": odd(lambda path: path.symlink_to("/dev/zero")),
        "link to itself": odd(lambda path: path.symlink_to("9.txt")),
        "huge file": odd(lambda path: os.truncate(path, 2**42) if path.touch() is None else None),
        "root missing": _text(words, root="/nowhere/at/all"),
        "root a number": _text(words, root=5),
        "root empty": _text(words, root=""),
        "pattern absolute": _text(words, pattern="/etc/*"),
        "pattern empty": _text(words, pattern=""),
        "pattern a number": _text(words, pattern=5),
        "pattern none": _text(words, pattern=None),
        "pattern of stars": _text(words, pattern="***"),
        "context 0": _text(words, context=0),
        "context fractional": _text(words, context=16.5),
        "context NaN": _text(words, context=float("nan")),
        "num_train 1": _text(words, num_train=1),
        "num_test text": _text(words, num_test="many"),
        "num_test 0": _text(words, num_test=0),
    }
    taken = {
        "good": _text(words),
        "no UTF-8": _text({f"{i}.txt": bytes(range(128, 256)) * 9 for i in range(3)}),
        "NULs": _text({f"{i}.txt": bytes(900) for i in range(3)}),
        "one huge line": _text({f"{i}.txt": b"a" * 10**6 for i in range(3)}),
        "a folder of that name": odd(lambda path: path.mkdir()),
        "link to nothing": odd(lambda path: path.symlink_to("nowhere")),
        "link to a file": odd(lambda path: path.symlink_to("1.txt")),
    }
    return {
        **{f"text: {name}": (REFUSED, make) for name, make in refused.items()},
        **{f"text: {name}": (TAKEN, make) for name, make in taken.items()},
    }


def _cifar() -> dict[str, tuple[str, Make]]:
    """Return folders of CIFAR-10 with files that are not its own; there is no network."""

    def cifar(change: Callable[[Path], Any], **values: Any) -> Make:
        def make(folder: Path) -> Node:
            (batches := folder / "cifar-10-batches-py").mkdir()
            change(batches)
            return {"_target_": "qat.data.Cifar10Data", "root": str(folder), **SMALL, **values}

        return make

    code = b"cos\nsystem\n(S'touch code-was-run'\ntR."
    makes = {
        "other pickle": cifar(lambda f: (f / "data_batch_1").write_bytes(code)),
        "all other pickles": cifar(
            lambda f: [(f / f"data_batch_{i}").write_bytes(code) for i in range(1, 6)]
        ),
        "pipe": cifar(lambda f: os.mkfifo(f / "data_batch_1")),
        "pipe for the archive": cifar(lambda f: os.mkfifo(f.parent / "cifar-10-python.tar.gz")),
        "batches are a file": cifar(lambda f: (f.rmdir(), f.touch())),
        "mean too short": cifar(lambda f: None, mean=[0.5, 0.5]),
        "root a number": cifar(lambda f: None, root=5),
    }
    return {f"CIFAR-10: {name}": (REFUSED, make) for name, make in makes.items()}


def _values() -> dict[str, tuple[str, Make]]:
    """Return generated sets with values that make no sense."""
    nan, inf = float("nan"), float("inf")
    refused: dict[str, list[Any]] = {
        "batch_size": [0, -1, 16.5, 2**70, True, "abc", None, nan, [4]],
        "val_fraction": [-0.1, 1, 1.5, nan, inf, "half", None, True],
        "num_workers": [-1, 1000, 1.5, "abc", None, True],
        "device": ["meta", "gpu", 5, True, ["cpu"], "cuda:99"],
        "size": [0, -1, 16.5, nan, inf, "large", 10**9, 10**5, True],
        "channels": [0, 1.5, None, 10**9],
        "augment": ["rotate", None, 5],
    }
    table: dict[str, list[Any]] = {
        "num_samples": [0, 9, 10.5, nan, 10**12, "many", None],
        "num_features": [0, -1, 10**12, 2.5],
        "num_classes": [0, 1, 2001, 10**9, 3.5, True],
        "distance": [nan, inf, -1, "far", 1e30],
    }
    taken = {"batch_size": [1, 10**6], "val_fraction": [0, 0.999], "size": [1, 9], "channels": [1]}

    def nodes(target: str, end: str, values: dict[str, list[Any]]) -> dict[str, tuple[str, Make]]:
        name = {"DigitsData": "digits", "TabularData": "table"}[target]
        return {
            f"{name}: {key}={value!r}": (
                end,
                lambda _, key=key, value=value: {
                    "_target_": f"qat.data.{target}",
                    **SMALL,
                    key: value,
                },
            )
            for key, options in values.items()
            for value in options
        }

    return {
        **nodes("DigitsData", REFUSED, refused),
        **nodes("TabularData", REFUSED, table),
        **nodes("DigitsData", TAKEN, taken),
        **nodes("TabularData", TAKEN, {"num_samples": [10, 1000], "num_features": [1]}),
    }
