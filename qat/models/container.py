"""What kind of file a checkpoint is, told by its first bytes before any library opens it."""

import zipfile
from pathlib import Path

from qat.errors import CheckpointError, printable
from qat.files import kind
from qat.memory import check_fits

HEAD = 512
CHUNK = 2**20
STATE_DICT = "torch.save(model.state_dict(), path)"
DOWNLOAD = "download it again"
OTHERS = (
    (
        b"\x89HDF",
        "an HDF5 file, as of Keras",
        f"convert it to PyTorch and save it with {STATE_DICT}",
    ),
    (b"\x93NUMPY", "a NumPy array", f"save tensors by name with {STATE_DICT}"),
    (b"GGUF", "a GGUF file, whose weights are quantized already", "start from the float weights"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer instead of the file",
        "fetch it with git lfs pull",
    ),
    (b"<!DOCTYPE", "a web page", DOWNLOAD),
    (b"<html", "a web page", DOWNLOAD),
)
ZIP = b"PK\x03\x04"
TAR_AT, TAR = 257, b"ustar"
JSON_AT, JSON = 8, b"{"


def check_kind(path: Path) -> None:
    """Refuse a file that cannot hold PyTorch tensors by name, whatever its name says.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is missing, no file, empty, unreadable, larger than memory or of
            another kind.
    """
    if (what := kind(path)) != "a file":
        raise CheckpointError(
            f"expected a checkpoint file at {printable(path)}, got: {what}; correct the path."
        )
    try:
        head = _head(path)
        if head.startswith(ZIP):
            _check_zip(path)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and its decoders raise a dozen kinds
        raise corrupt(path, printable(error)) from error
    _refuse_others(path, head)


def _refuse_others(path: Path, head: bytes) -> None:
    if not head:
        raise corrupt(path, "it is empty")
    for start, name, remedy in OTHERS:
        if head.startswith(start):
            raise _other(path, name, remedy)
    if head[TAR_AT:].startswith(TAR):
        raise _other(path, "a tar archive", f"save what it holds with {STATE_DICT}")


def is_safetensors(path: Path) -> bool:
    """Return whether a file has the suffix of safetensors or begins like one."""
    return path.suffix == ".safetensors" or _head(path)[JSON_AT:].startswith(JSON)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _check_zip(path: Path) -> None:
    """Refuse archives that are no file of ``torch.save``, or that unpack to more than memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise _other(path, "a TorchScript archive", f"save its weights with {STATE_DICT}")
    if not any(name.endswith("data.pkl") for name in names):
        what = "NumPy arrays" if any(name.endswith(".npy") for name in names) else "other files"
        raise _other(path, f"a zip archive of {what}", f"save tensors by name with {STATE_DICT}")
    total = sum(entry.file_size for entry in entries)
    check_fits(total, f"the tensors of {printable(path)}", "the file is damaged", CheckpointError)
    _check_sums(path)


def _check_sums(path: Path) -> None:
    """Compare the checksums of an archive, which torch itself does not; 0 stands for none."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.CRC:
                with archive.open(entry) as stream:
                    while stream.read(CHUNK):
                        pass


def _other(path: Path, name: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"expected a PyTorch or safetensors checkpoint at {printable(path)}, got {name}: {remedy}."
    )


def corrupt(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file that cannot be read.

    Args:
        path: The file.
        reason: Why, in a few words.
    """
    return CheckpointError(
        f"expected a PyTorch or safetensors checkpoint at {printable(path)}, but it cannot be read "
        f"({reason}); the file is cut off, damaged or of another kind, so copy or download it "
        f"again."
    )
