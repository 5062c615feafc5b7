"""How far an output has come and of what it is made, in a file beside it.

The file is replaced after every batch (of parquet: part), behind the output itself, so whatever a
killed process left behind the place it names is cut off and done again. It carries hashes of what
was written and of itself: what somebody has edited since is not gone on with.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.errors import ConfigError
from qat.files import write_text
from qat.predict.ownership import state_path

NOTHING = hashlib.sha256().hexdigest()
CHECKSUM = "checksum"
MOST_BYTES = 1 << 16


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
        sha256: Hash of that much of it.
        unreadable: Bytes of the list of what was left out.
        unreadable_sha256: Hash of them.
        finished: Whether nothing is to be added.
    """

    batches: int = 0
    predicted: int = 0
    size: int = 0
    sha256: str = NOTHING
    unreadable: int = 0
    unreadable_sha256: str = NOTHING
    finished: bool = False


def save(path: Path, request: Request, place: Place) -> None:
    """Write how far an output has come: the old state is there until the new one is whole."""
    content = {**asdict(request), **asdict(place)}
    content[CHECKSUM] = _checksum(content)
    write_text(state_path(path), json.dumps(content, indent=1) + "\n", sync=False)


def find_state(path: Path) -> dict[str, Any] | None:
    """Return what the state of an output says, unchecked; None if there is no state of ours."""
    try:
        with state_path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            return None
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(content, dict) and {*asdict(Request("", "", {})), "batches"} <= {*content}
    return content if is_ours else None


def read_state(content: dict[str, Any], path: Path) -> tuple[Request, Place]:
    """Return what a state says.

    Args:
        content: What `find_state` returned.
        path: The output.

    Raises:
        ConfigError: If it is not as it was written.
    """
    content = dict(content)
    checksum = content.pop(CHECKSUM, None)
    request, place = asdict(Request("", "", {})), asdict(Place())
    if content.keys() != {*request, *place}:
        raise edited(path, "has other keys")
    for key, example in {**request, **place}.items():
        if not _is_like(content[key], example):
            raise edited(path, f"has {key} {str(content[key])[:80]}")
    if checksum != _checksum(content):
        raise edited(path, "has another checksum")
    return Request(*(content[key] for key in request)), Place(**{k: content[k] for k in place})


def edited(path: Path, what: str) -> ConfigError:
    """Return the error for a state that is not as it was written."""
    return ConfigError(
        f"expected '{state_path(path)}' to say how far '{path}' has come, as it was written, but "
        f"it {what}: start again with --force."
    )


def check_place(place: Place, path: Path, total: int, batch: int) -> None:
    """Check that a place lies within the inputs.

    Args:
        place: How far an output has come.
        path: The output.
        total: Inputs in all.
        batch: Inputs of a batch.

    Raises:
        ConfigError: If it does not.
    """
    batches = -(-total // batch)
    done = min(place.batches * batch, total)
    if place.batches > batches or place.predicted > done:
        raise edited(path, f"says {place.batches} batches, {place.predicted} predicted of {total}")
    if place.finished and place.batches != batches:
        raise edited(path, f"is finished after {place.batches} of {batches} batches")


def check_same(old: Request, new: Request, path: Path) -> None:
    """Check that an output is gone on with for what it is made of.

    Raises:
        ConfigError: If it is made of something else.
    """
    before, now = _flat(old), _flat(new)
    for key in {**now, **before}:
        was, wanted = before.get(key), now.get(key)
        if was != wanted or type(was) is not type(wanted):
            raise ConfigError(
                f"expected to resume '{path}' with the same {key}, which was {str(was)[:40]} and "
                f"is {wanted}: repeat the first command, or start again with --force."
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content


def _is_like(value: Any, example: Any) -> bool:
    """Return whether a value has the type of an example; hashes are 64 digits, numbers no less."""
    if type(value) is not type(example):
        return False
    if isinstance(value, str):
        return re.fullmatch("[0-9a-f]{64}", value) is not None
    return type(value) is not int or 0 <= value < 1 << 63


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flat(request: Request) -> dict[str, Any]:
    hashes = {"model file": request.model, "inputs (names, sizes, times)": request.inputs}
    return {key: value[:12] for key, value in hashes.items()} | request.options
