"""What ``torch.save`` wrote, read with ``weights_only=True`` and never otherwise.

A pickle can run any code. What usual checkpoints carry beside their tensors (arguments of the
command, scalars of NumPy, paths, dates) is read as a stand-in that holds nothing.
"""

import mmap
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qat.errors import CheckpointError, printable
from qat.models.container import STATE_DICT, check_kind, corrupt

UNSAFE = re.compile(
    r"GLOBAL ([\w.]+)|unrecognized function|Can only (?:create|build)|must be imported"
)
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.datetime",
    "datetime.timedelta",
    *(
        f"pathlib{module}.{name}"
        for module in ("", "._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
"""Names of classes and functions that a file may mention; none of them is called."""


class StandIn:
    """An object that a checkpoint mentions: it takes everything, and keeps and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "StandIn":
        """Take any arguments, also those of a function."""
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        """Take any attributes."""


def read_pickle(path: Path, harmless: tuple[str, ...] = ()) -> Any:
    """Read what ``torch.save`` wrote, as long as it is plain values and tensors.

    Args:
        path: The file.
        harmless: Names of classes and functions in whose place stand-ins come.

    Raises:
        CheckpointError: If the file is missing, corrupt or unsafe.
    """
    check_kind(path)
    _refuse_bytearrays(path)
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    stand_ins = [(StandIn, name) for name in harmless]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # advice about formats of old
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise any kind
        if found := UNSAFE.search(str(error)):
            raise _unsafe(path, found[1] or "a call") from error
        raise corrupt(path, reason_of(error)) from error


def _refuse_bytearrays(path: Path) -> None:
    """Refuse the one type that torch permits and that takes any amount of memory by a number."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray\n") >= 0:
            raise _unsafe(path, "bytearray")


def _unsafe(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"expected only tensors in {printable(path)}, but it contains Python code or objects "
        f"({printable(name)}), which could do anything when loaded; ask its author for a "
        f".safetensors file or for the state_dict alone ({STATE_DICT})."
    )


def reason_of(error: Exception) -> str:
    """Return the sentence of an error that names the cause, without advice to load unsafely."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    sentence = text.strip().partition("\n")[0].partition(". ")[0]
    if "weights_only" in sentence or "safe_globals" in sentence:
        return "a format that torch does not read safely"
    return printable(sentence).rstrip(". ") or type(error).__name__
