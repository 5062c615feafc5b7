"""Configs that come out of files: what they may build.

A config names classes and functions, and building one calls it with the config's own arguments. So
a checkpoint or the ``config.yaml`` beside a model could run anything that is installed. What is
read from a file builds only what our own configs name for that section, what an installed package
registers under the entry point ``qat.targets``, and what the user permits by name.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from qat.errors import ConfigError
from qat.extensions import MODULES, import_modules, is_module
from qat.folders import find_folder
from qat.kinds import require

ENTRY_POINTS = "qat.targets"
LARGEST = 2**20
"""Bytes of a ``config.yaml``; ours have some thousand."""
_DEEPEST = 20
_TIMM = "timm.create_model"
_TIMM_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


def add_allow(parser: ArgumentParser) -> None:
    """Add the option ``--allow``, by which a user permits a class."""
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="let the config in the file build package.module.Class, or import package.module",
    )


def check_stored(
    config: Mapping[str, Any], sections: Collection[str], source: Path, allow: Collection[str] = ()
) -> None:
    """Refuse a config of a file that would build what nobody named.

    Args:
        config: Plain values.
        sections: Keys at its top that are going to be built.
        source: The file.
        allow: Targets that the user permits: ``package.module.Class``, or modules.

    Raises:
        ConfigError: Names what it would build, and how to permit that.
    """
    for section in sections:
        permitted = {*known_targets(section), *_registered(), *allow}
        for key, value in _walk(config.get(section), section):
            _check_value(key, value, permitted, source)


def import_stored(config: Mapping[str, Any], source: Path, allow: Collection[str] = ()) -> None:
    """Import the modules of a config of a file that register its words, where they are permitted.

    Args:
        config: Plain values; older runs have no ``imports``.
        source: The file.
        allow: Modules that the user permits; all of them are imported.

    Raises:
        ConfigError: Names what it would import, and how to permit that.
    """
    named = config.get("imports", [])
    require(f"imports of the config in '{source}'", named, MODULES)
    permitted = {*_registered(), *allow}
    for name in named:
        if name not in permitted:
            raise ConfigError(
                f"expected the config in '{source}' to import only what qat itself has, got "
                f"imports={name!s:.200}: if you know it and trust it, permit it with --allow "
                f"{name!s:.200}; otherwise do not use the file."
            )
    import_modules(list(dict.fromkeys([*named, *filter(is_module, allow)])))


def _check_value(key: str, value: Any, permitted: Collection[str], source: Path) -> None:
    name = key.rpartition(".")[2]
    if name == "_target_" and not (isinstance(value, str) and value in permitted):
        raise ConfigError(
            f"expected the config in '{source}' to build only what qat itself names, got "
            f"{key}={value!s:.200}: if you know it and trust it, permit it with --allow "
            f"{value!s:.200}; otherwise do not use the file."
        )
    if name.startswith("_") and name != "_target_":
        raise ConfigError(
            f"expected plain values in the config in '{source}', got {key}: do not use the file, "
            "or remove the key."
        )
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"expected plain values in the config in '{source}', got {key}={value!s:.200}: "
            "what it refers to is not known here; put the value itself there."
        )
    if key == "model.model_name" and (not isinstance(value, str) or ":" in value):
        raise ConfigError(
            f"expected the name of a timm model in '{source}', got {key}={value!s:.200}, which "
            "would be downloaded: build it yourself, and give its weights with ckpt=FILE."
        )


def _walk(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of everything inside."""
    if depth > _DEEPEST:
        raise ConfigError(f"expected a config, got '{key:.200}...': it is nested too deeply.")
    yield key, value
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(part, f"{key}.{name}", depth + 1)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _walk(part, f"{key}.{i}", depth + 1)


@cache
def known_targets(section: str) -> frozenset[str]:
    """Return what our own configs build in a section, such as ``data``."""
    files = [*(find_folder("conf") / section).glob("*.yaml")]
    nodes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]
    targets = {node.get("_target_") for node in nodes if isinstance(node, dict)}
    return frozenset(target for target in targets if target not in (None, "???"))


@cache
def _registered() -> frozenset[str]:
    """Return what installed packages permit: ``package.module:Class``, with dots."""
    return frozenset(p.value.replace(":", ".") for p in entry_points(group=ENTRY_POINTS))


def without_downloads(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model whose weights come from elsewhere, so that none are fetched."""
    if model.get("_target_") != _TIMM:
        return dict(model)
    return {key: value for key, value in model.items() if key not in _TIMM_WEIGHTS}


def check_yaml(path: Path) -> None:
    """Refuse a YAML file that is too large, or uses references: with them it could grow endlessly.

    Raises:
        ConfigError: If it is one of those, or no regular file, no text or no YAML.
    """
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ConfigError(
            f"expected the config of a run at '{path}', got no regular file of at most "
            f"{LARGEST:,} bytes: give the data on the command line and remove the file."
        )
    try:
        events = yaml.parse(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        refers = any(isinstance(event, yaml.AliasEvent) for event in events)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"expected the config of a run at '{path}', got {type(error).__name__}: repair or "
            "remove the file."
        ) from error
    if refers:
        raise ConfigError(
            f"expected the config of a run at '{path}', got one with references (*name): write "
            "their values out, or remove the file."
        )
