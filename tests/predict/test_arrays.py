"""Rows of .npz files: the same values as numpy's, in memory that does not grow with the file."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest

from qat.errors import DataError
from qat.predict.arrays import CHUNK, open_array, read_row

SAVE = {"stored": np.savez, "deflated": np.savez_compressed}
PEAK = """
import sys, tracemalloc
from pathlib import Path
from qat.predict.arrays import open_array

tracemalloc.start()
rows = open_array(Path(sys.argv[1]), verify=True)
total = sum(int(rows[i].sum()) for i in range(0, rows.shape[0], int(sys.argv[2])))
print(total, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
@pytest.mark.parametrize("dtype", ["uint8", "float32", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 3, 2), (0, 3)])
def test_rows_are_those_of_numpy(save, dtype, order, shape, tmp_path):
    x = np.asarray(np.random.default_rng(0).integers(0, 200, shape), dtype, order=order)
    save(tmp_path / "a.npz", x)
    rows = open_array(tmp_path / "a.npz", verify=True)
    assert (rows.shape, rows.dtype) == (x.shape, x.dtype)
    for i in [*range(0, len(x), 2), *range(len(x))]:  # skips, goes back, goes on
        np.testing.assert_array_equal(rows[i], x[i])


@pytest.mark.parametrize("step", [1, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_memory_does_not_grow_with_an_npz(save, step, tmp_path):
    """96 MiB are read in the memory of the two chunks that zipfile skips by, 16 MiB each."""
    x = np.full((96, CHUNK), 3, np.uint8)
    save(tmp_path / "a.npz", x)
    command = [sys.executable, "-c", PEAK, tmp_path / "a.npz", str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, peak = map(int, done.stdout.split())
    assert total == 3 * CHUNK * len(range(0, 96, step))
    assert peak < (2 * 16 + 4) * CHUNK  # and a few rows and the interpreter's own


def test_damage_anywhere_is_found_before_the_first_row(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)
    for name, save in SAVE.items():
        save(tmp_path / f"{name}.npz", x)
        whole = (tmp_path / f"{name}.npz").read_bytes()
        for place in range(300, 4000, 97):
            broken = bytearray(whole)
            broken[place] ^= 1
            (tmp_path / "broken.npz").write_bytes(broken)
            with pytest.raises(DataError, match="expected an array"):
                open_array(tmp_path / "broken.npz", verify=True)


def test_a_member_that_is_no_array_of_that_size(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 100)))
    for content, reason in [
        ((tmp_path / "a.npy").read_bytes()[:-1], "too few for shape"),
        (b"no array", "magic string"),
    ]:
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("a.npy", content)
        with pytest.raises(DataError, match=reason):
            open_array(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    with pytest.raises(DataError, match=r"x_test, in '.*', got none"):
        open_array(tmp_path / "a.npz")


def header(shape, order="False", descr="'<f4'"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    "content",
    [
        header("(1099511627776, 3)"),
        header("(1099511627776, 3)", order="True"),
        header("(-1, 3)") + bytes(99),
        header("(1, 3)", descr="'|O'") + bytes(99),
        header("__import__('os').system('false')"),
        b"",
    ],
)
def test_what_a_header_claims_takes_no_memory(content, suffix, tmp_path):
    file = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        file.write_bytes(content)
    else:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", content)
    with pytest.raises(DataError, match="expected an array"):
        open_array(file, verify=True)


def test_members_that_numpy_would_not_have_written(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.asfortranarray(np.zeros((4, 100))))
    content = (tmp_path / "a.npy").read_bytes()
    file = tmp_path / "a.npz"
    for kind, reason in [
        (zipfile.ZIP_BZIP2, "compressed as numpy does not"),
        (zipfile.ZIP_LZMA, "compressed as numpy does not"),
        (zipfile.ZIP_DEFLATED, "column by column"),
    ]:
        with zipfile.ZipFile(file, "w", kind) as archive:
            archive.writestr("a.npy", content)
        monkeypatch.setattr("qat.predict.arrays.MOST_UNPACKED", len(content) - 200)
        with pytest.raises(DataError, match=reason):
            open_array(file)
    claims = bytearray(file.read_bytes())
    place = claims.index(b"PK\1\2") + 24  # of the unpacked size
    claims[place : place + 4] = (2**32 - 16).to_bytes(4, "little")
    file.write_bytes(claims)
    with pytest.raises(DataError, match="cannot become 4294967280"):
        open_array(file)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    """As memory that is mapped, it would end the process."""
    np.save(tmp_path / "a.npy", np.zeros((400, 1000)))
    rows = open_array(tmp_path / "a.npy")
    assert not read_row(rows, 0, tmp_path / "a.npy").any()
    with (tmp_path / "a.npy").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match="the file has changed"):
        read_row(rows, 399, tmp_path / "a.npy")
