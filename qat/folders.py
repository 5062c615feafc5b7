"""Where the files of configs and recipes are."""

from __future__ import annotations

from pathlib import Path

from qat.errors import ConfigError

PACKAGE = Path(__file__).parent


def find_folder(name: str) -> Path:
    """Return ``conf`` or ``recipes``: inside an installed wheel, or beside a source tree's package.

    Raises:
        ConfigError: If it is in neither place.
    """
    for folder in (PACKAGE / f"_{name}", PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"expected the folder '{name}' beside the package, got none: reinstall qat.")
