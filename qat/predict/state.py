"""How far an output has come and of what it is made, in a file beside it.

The file is replaced after every batch (of parquet: part), behind the output itself, so whatever a
killed process left behind the place it names is cut off and done again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.errors import ConfigError
from qat.predict.parquet import remove_parts


@dataclass(frozen=True)
class Request:
    """What an output is made of; it can only be gone on with for the same.

    Attributes:
        model: Hash of the model file.
        inputs: Hash of names, sizes and times of change.
        options: What else has an influence on the output.
    """

    model: str
    inputs: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """How far a prediction has come.

    Attributes:
        batches: How many are done.
        predicted: Inputs that were predicted.
        size: Of the output: bytes, or parts.
        unreadable: Bytes of the list of what was left out.
        finished: Whether nothing is to be added.
    """

    batches: int = 0
    predicted: int = 0
    size: int = 0
    unreadable: int = 0
    finished: bool = False


def state_path(path: Path) -> Path:
    """Return where the state of an output is kept."""
    return path.with_name(f"{path.name}.state.json")


def unreadable_path(path: Path) -> Path:
    """Return where what an output leaves out is listed."""
    return path.with_name(f"{path.name}.unreadable.csv")


def begin(path: Path, request: Request, *, resume: bool, force: bool) -> Place:
    """Return where to begin an output: anew, or with ``resume`` where it was stopped.

    Args:
        path: The output.
        request: What it shall be made of.
        resume: Whether one that is there is gone on with.
        force: Whether one that is there is deleted.

    Raises:
        ConfigError: If one is there and neither is asked for, or it is made of something else.
    """
    if resume and path.exists():
        return _find_place(path, request)
    if path.exists() and not force:
        raise ConfigError(
            f"expected a new output, but '{path}' exists: go on with it by --resume, replace it by "
            "--force, or choose another name."
        )
    if path.is_dir():
        remove_parts(path)
    else:
        path.unlink(missing_ok=True)
    for beside in (unreadable_path(path), state_path(path)):
        beside.unlink(missing_ok=True)
    return Place()


def save(path: Path, request: Request, place: Place) -> None:
    """Write how far an output has come: the old state is there until the new one is whole."""
    state, content = state_path(path), {**asdict(request), **asdict(place)}
    hidden = state.with_name(f".{state.name}")
    hidden.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    hidden.replace(state)


def _find_place(path: Path, request: Request) -> Place:
    state = state_path(path)
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        found = Request(*(content.pop(key) for key in asdict(request)))
        place = Place(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"expected '{state}' to say how far '{path}' has come, but it cannot be read "
            f"({type(error).__name__}): start again with --force."
        ) from error
    for key, new in _flat(request).items():
        if (old := _flat(found).get(key)) != new:
            raise ConfigError(
                f"expected to resume '{path}' with the same {key}, which was {old} and is {new}: "
                "repeat the first command, or start again with --force."
            )
    return place


def _flat(request: Request) -> dict[str, str]:
    hashes = {"model file": request.model, "inputs (names, sizes, times)": request.inputs}
    return {k: v[:12] for k, v in hashes.items()} | {k: str(v) for k, v in request.options.items()}


def hash_file(path: Path) -> str:
    """Return a hash of what is in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
