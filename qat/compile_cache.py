"""A folder for compiled code that can be written to.

torch makes its own when it is imported, below the system's temporary files or where
``TORCHINDUCTOR_CACHE_DIR`` says, and cannot be imported where that fails.
"""

from __future__ import annotations

import atexit
import getpass
import logging
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
log = logging.getLogger("qat")


def ensure_compile_cache() -> None:
    """Point torch to a temporary folder, and say so, where it cannot write to its own."""
    folder = os.environ.get(VARIABLE)
    reason = _try_writing(Path(folder) if folder else _default())
    if reason is None:
        return
    own = tempfile.mkdtemp(prefix="qat-compiled-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ[VARIABLE] = own
    log.warning("compiled code is kept in a temporary folder, for this run only: %s", reason)


def _default() -> Path:
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def _try_writing(folder: Path) -> OSError | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error
