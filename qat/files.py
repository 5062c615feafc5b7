"""Files that are whole or as they were: written beside, flushed to the disk, then put in place.

A process that dies in between leaves one hidden file, which the next write of the same path
replaces; the file that was there stays. Text is UTF-8 whatever the locale says.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind(path: str | Path) -> str:
    """Say what is at ``path``, links followed, without opening it: a pipe would wait for ever.

    Returns:
        "a file", "a folder", "a pipe", "a socket", "a device", "nothing", or what the system says
        about a path that cannot be looked up.
    """
    try:
        return KINDS.get(stat.S_IFMT(Path(path).stat().st_mode), "something else")
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:  # ValueError: a NUL or a surrogate in the name
        return getattr(error, "strerror", None) or str(error)


@contextmanager
def replacing(path: str | Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes the place of ``path`` once the block has ended.

    If the block raises, ``path`` stays as it was and nothing else is left behind.

    Args:
        path: The file; what it is a link to is replaced, not the link. A device or a pipe is
            written to directly, for it cannot be replaced.
        sync: Whether it is safe from a crash of the machine, too, which takes milliseconds.

    Raises:
        OSError: If it cannot be written: no space, no rights, no folder.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    hidden = path.with_name(f".{path.name}.part")
    hidden.unlink(missing_ok=True)  # of a process that died
    try:
        with hidden.open("xb") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        if path.exists():
            hidden.chmod(path.stat().st_mode & 0o7777)
        hidden.replace(path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    if sync:
        _flush_folder(path.parent)


def write_bytes(path: str | Path, content: bytes, *, sync: bool = True) -> None:
    """Write ``content`` to ``path``, whole or not at all; ``sync`` as in `replacing`.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path, sync=sync) as stream:
        stream.write(content)


def write_text(path: str | Path, text: str, *, sync: bool = True) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all; ``sync`` as in `replacing`.

    Raises:
        OSError: If it cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), sync=sync)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's table of names, where the system has such a call."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems have none; the file itself is flushed
    finally:
        os.close(handle)


def write_all(handle: int, content: bytes) -> None:
    """Write all of ``content`` to an open file, unbuffered: an error leaves nothing to write later.

    Raises:
        OSError: If it cannot be written.
    """
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]
