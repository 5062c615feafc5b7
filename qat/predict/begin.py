"""Whether an output begins anew, goes on or replaces one: decided before anything is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qat.errors import ConfigError
from qat.predict.ownership import list_beside, state_path, unreadable_path
from qat.predict.parquet import PARTS, find_foreign, hash_parts, remove_parts
from qat.predict.state import Place, Request, check_same, edited, find_state, read_state
from qat.predict.writer import hash_start


def begin(path: Path, request: Request, *, resume: bool, force: bool) -> Place:
    """Return where to begin an output: anew, or with ``resume`` where it was stopped.

    Args:
        path: The output.
        request: What it shall be made of.
        resume: Whether one that is there is gone on with.
        force: Whether one that is there is deleted.

    Raises:
        ConfigError: If one is there and neither is asked for, it is made of something else, or not
            ours: no state of ours is beside it.
        DataError: If less is there than its state says.
    """
    there = [file for file in (path, *list_beside(path)) if os.path.lexists(file)]
    if not there:
        return Place()
    if not (resume or force):
        raise ConfigError(
            f"expected a new output, but '{there[0]}' exists: go on with it by --resume, replace "
            "it by --force, or choose another name."
        )
    content = find_state(path)
    if content is None and _is_empty_folder(path) and there == [path]:
        return Place()
    _check_ours(path, content, there[0])
    if resume and content is not None:
        return _go_on(path, request, content)
    _delete(path)
    return Place()


def _check_ours(path: Path, content: dict[str, Any] | None, first: Path) -> None:
    """Refuse what is not known to be ours: it may be the only copy of something."""
    if content is None:
        raise ConfigError(
            f"expected '{state_path(path)}' to say how far '{path}' has come, but it is missing or "
            f"damaged, so that '{first}' may be somebody else's, even with --force: delete it "
            "yourself, or choose another name."
        )
    size = content.get("size")
    foreign = find_foreign(path, size if type(size) is int else 0) if path.is_dir() else None
    if foreign is not None:
        raise ConfigError(
            f"expected only parts of ours in '{path}', got '{foreign.name}', which is none of "
            f"{size}: move it away, or choose another name."
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.glob(PARTS), None) is None


def _go_on(path: Path, request: Request, content: dict[str, Any]) -> Place:
    old, place = read_state(content, path)
    check_same(old, request, path)
    is_folder = request.options["format"] == "parquet"
    digest = hash_parts(path, place.size) if is_folder else hash_start(path, place.size)
    unreadable = hash_start(unreadable_path(path), place.unreadable)
    hashes = digest.hexdigest(), unreadable.hexdigest()
    files = path, unreadable_path(path)
    for file, found, wanted in zip(
        files, hashes, (place.sha256, place.unreadable_sha256), strict=True
    ):
        if found != wanted:
            raise edited(path, f"describes another '{file}', which was edited since")
    if place.finished and _has_more(path, place, is_folder=is_folder):
        raise edited(path, f"is finished, and '{path}' has grown since")
    return place


def _has_more(path: Path, place: Place, *, is_folder: bool) -> bool:
    size = len(list(path.glob(PARTS))) if is_folder else path.stat().st_size
    return (size, unreadable_path(path).stat().st_size) != (place.size, place.unreadable)


def _delete(path: Path) -> None:
    """Delete an output of ours; its state last, so that a kill leaves nobody's files."""
    if path.is_dir():
        remove_parts(path)
    else:
        path.unlink(missing_ok=True)
    unreadable, state, hidden = list_beside(path)
    for file in (unreadable, hidden, state):
        file.unlink(missing_ok=True)
