"""Whether something fits, looked up before memory is taken: main memory and shared memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qat.errors import QatError

SHARED = Path("/dev/shm")  # where worker processes hand over tensors on Linux
MEMINFO = Path("/proc/meminfo")
UNKNOWN = 8 * 2**30
CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Return the bytes that this process can still take: the system's and the container's limit."""
    free = _free()
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="utf-8"))
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return max(0, min(free, limit - used))


def _free() -> int:
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # another system: all that is built in, or a guess
        has_facts = hasattr(os, "sysconf")
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_facts else UNKNOWN


def check_fits(num_bytes: int, what: str, remedy: str, error: type[QatError]) -> None:
    """Refuse what is larger than the memory that is left.

    Args:
        num_bytes: How large it is.
        what: What needs it and where, for the message.
        remedy: What to do.
        error: Kind of the error raised.

    Raises:
        QatError: The given kind, if it does not fit.
    """
    if num_bytes > (free := available()):
        raise error(
            f"expected {what} to fit into the {shown(free)} of memory that are free, got "
            f"{shown(num_bytes)}: {remedy}."
        )


def free_shared() -> int | None:
    """Return the free bytes of shared memory; None where the system has no folder for it."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return None


def shown(num_bytes: int) -> str:
    """Return a size for a message: ``8 kB``, ``64 MB``, ``1.2 GB``."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.1f} GB"
    return f"{num_bytes / 10**6:.0f} MB" if num_bytes >= 10**6 else f"{num_bytes / 1000:.0f} kB"
