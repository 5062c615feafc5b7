"""Which files an output may create, go on with or delete: those of its own, and no input.

Files are compared, not names: links, ``..``, capitals where the system ignores them and names in
linked folders lead to the same file. Nothing is opened, for a pipe would wait and a device act.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from qat.errors import ConfigError
from qat.predict.arrays import ARRAYS
from qat.predict.parquet import PARTS


def state_path(path: Path) -> Path:
    """Return where the state of an output is kept."""
    return path.with_name(f"{path.name}.state.json")


def unreadable_path(path: Path) -> Path:
    """Return where what an output leaves out is listed."""
    return path.with_name(f"{path.name}.unreadable.csv")


def list_beside(path: Path) -> list[Path]:
    """Return the files beside an output; the last is of a process that died writing the state."""
    state = state_path(path)
    return [unreadable_path(path), state, state.with_name(f".{state.name}.part")]


def check_target(path: Path, others: Iterable[Path], *, is_folder: bool) -> None:
    """Check that an output can be where it shall, without touching anything.

    Args:
        path: The output.
        others: The files that it is made of.
        is_folder: Whether it is a folder of parts.

    Raises:
        ConfigError: If it, or a file beside it, is an input, a device, a pipe or a folder.
    """
    _check_apart(path, others, is_folder=is_folder)
    if path.suffix.lower() in (*IMG_EXTENSIONS, *ARRAYS) or path.name in ("", "..", "-"):
        raise ConfigError(
            f"expected an output with the name of a table, got '{path}', which would be taken for "
            "an input the next time: choose another name."
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"expected a folder to write '{path}' in, got none at '{path.parent}': create it."
        )
    _check_kind(path, is_folder=is_folder)
    for file in list_beside(path):
        _check_kind(file, is_folder=False)


def _check_kind(path: Path, *, is_folder: bool) -> None:
    mode = find_mode(path)
    if mode is None or (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        return
    raise ConfigError(
        f"expected a {'folder' if is_folder else 'file'} or nothing at '{path}', got "
        f"{describe_mode(mode)}: choose another name."
    )


def find_mode(path: Path) -> int | None:
    """Return the kind of what is at a path, links followed; 0 for a broken link, None if nothing.

    Raises:
        OSError: If it cannot be looked at.
    """
    try:
        return path.stat().st_mode
    except OSError:
        if not os.path.lexists(path):
            return None
        if path.is_symlink():
            return 0
        raise


def describe_mode(mode: int) -> str:
    """Return what a mode is called."""
    kinds = {
        0: "a link to nothing",
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _check_apart(path: Path, others: Iterable[Path], *, is_folder: bool) -> None:
    """Check that no file of an output is one of the others, and that none lies in its folder."""
    own = {_identify(file) for file in (path, *list_beside(path))} - {None}
    folder = _identify(path) if is_folder else None
    inside = {_identify(part) for part in path.glob(PARTS)} if folder else set()
    parents: dict[Path, bool] = {}
    for file in others if own else ():
        place = Path(os.path.realpath(file)).parent
        if place not in parents:
            above = (place, *place.parents) if folder else ()
            parents[place] = any(_identify(each) == folder for each in above)
        if parents[place] or _identify(file) in own | inside:
            raise ConfigError(
                f"expected an output that is no input, got '{path}', which would replace '{file}': "
                "choose another."
            )


def _identify(path: Path) -> tuple[int, int] | None:
    """Return what only this file has, whatever it is called; None if there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
