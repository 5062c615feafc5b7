"""Memory that stays with the process: what a step frees is what the next one takes.

The C library gives large blocks back to the system when they are freed, and the system clears each
page before it hands it out again: a tenth to a quarter of the time of a small step. Blocks from one
heap that is never cut keep their pages; peaks stay what they were, but are not given back.
"""

from __future__ import annotations

import ctypes

from qat.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
NEVER = -1


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process until it ends; return whether the C library can.

    Only glibc can: elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))


def apply_keep_memory(wanted: object) -> None:
    """Do what ``keep_memory`` of a config says.

    Raises:
        ConfigError: If it is neither true nor false.
    """
    if not isinstance(wanted, bool):
        raise ConfigError(
            f"expected keep_memory=true or keep_memory=false, got {wanted!r}: correct it."
        )
    if wanted:
        keep_freed_memory()
