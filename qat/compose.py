"""From the words of a command line to a config: groups, recipes, and sentences for mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torchvision
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from qat.errors import ConfigError, QatError
from qat.run_folder import run_dir

PACKAGE = Path(__file__).parent
DATA_KEYS = ("data", "recipe", "seed")


def find_folder(name: str) -> Path:
    """Return ``conf`` or ``recipes``: inside an installed wheel, or beside a source tree's package.

    Raises:
        ConfigError: If it is in neither place.
    """
    for folder in (PACKAGE / f"_{name}", PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"expected the folder '{name}' beside the package, got none: reinstall qat.")


def register() -> None:
    """Tell Hydra our recipes, every torchvision model by name, and the run folder's resolver."""
    store = ConfigStore.instance()
    folders = [find_folder("recipes"), Path.cwd() / "recipes"]
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            store.store(group="recipe", name=name, node=OmegaConf.load(path), package="_global_")
    known = {path.stem for path in (find_folder("conf") / "model").glob("*.yaml")}
    for name in torchvision.models.list_models(module=torchvision.models):
        if name not in known:
            store.store(group="model", name=name, node={"name": name})
    OmegaConf.register_new_resolver("qat_run_dir", run_dir, replace=True, use_cache=True)


def compose(overrides: Sequence[str], output_dir: Path) -> DictConfig:
    """Compose a config as the command line would, for scripts and tests.

    Args:
        overrides: What would stand on the command line, such as ``recipe=resnet_w4a8``.
        output_dir: The run folder.

    Raises:
        ConfigError: If it does not compose.
    """
    register()
    conf = str(find_folder("conf").resolve())
    try:
        with hydra.initialize_config_dir(conf, version_base="1.3"):
            return hydra.compose("config", [*overrides, f"output_dir='{output_dir}'"])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def compose_plain(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a config as plain values, for scripts that train nothing.

    Args:
        overrides: What would stand on the command line.

    Raises:
        ConfigError: If it does not compose, or a value is missing.
    """
    cfg = compose(overrides, Path())
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    return values


def compose_parts(overrides: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Compose a config and return only ``keys``; values that others lack are not asked for.

    Args:
        overrides: What would stand on the command line.
        keys: Names at the top of the config, such as ``model``.

    Raises:
        ConfigError: If it does not compose, or one of them lacks a value.
    """
    cfg = compose(overrides, Path())
    try:
        return {key: _plain(cfg[key]) for key in keys}
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def compose_data(overrides: Sequence[str], run: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``data`` and ``seed``, for scripts whose model comes from a file.

    Args:
        overrides: ``data=...`` or ``recipe=...`` chooses other data than the run's; without
            either, keys such as ``data.batch_size=8`` change the run's.
        run: The config that the file was trained with, if it is known.

    Raises:
        ConfigError: If an override is about anything else, or the config does not compose.
    """
    _refuse_others(overrides, DATA_KEYS)
    given: list[str] = []
    if run is not None:
        given.append(f"seed={run['seed']}")
        if not any(override.startswith(("data=", "recipe=")) for override in overrides):
            ConfigStore.instance().store(name="_run", group="data", node=dict(run["data"]))
            given.append("data=_run")
    config = compose_plain([*given, *overrides])
    return {"data": config["data"], "seed": config["seed"]}


def compose_export(overrides: Sequence[str], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data``, ``seed`` and ``export``, to export a model of a file once more.

    Args:
        overrides: What ``compose_data`` takes, and changes of the run's ``export``, such as
            ``export.storage=size``.
        run: The config that the file was trained with.

    Raises:
        ConfigError: If an override is about anything else, or the config does not compose.
    """
    _refuse_others(overrides, ("data", "export", "recipe", "seed"))
    own = [override for override in overrides if _group(override) == "export"]
    data = compose_data([override for override in overrides if override not in own], run)
    node = {"defaults": ["default", "_self_"], **run["export"]}  # files may lack newer keys
    ConfigStore.instance().store(name="_run", group="export", node=node)
    given = [] if any(override.startswith("export=") for override in own) else ["export=_run"]
    return {**data, **compose_parts([*given, *own], ["export"])}


def _refuse_others(overrides: Sequence[str], groups: Sequence[str]) -> None:
    for override in overrides:
        if _group(override) not in groups:
            raise ConfigError(
                f"expected overrides of {', '.join(groups)} only, got '{override}': the model "
                "and the rest come from the file; leave it out."
            )


def _group(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def _plain(node: Any) -> Any:
    if not OmegaConf.is_config(node):
        return node
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


def read_config(path: Path) -> dict[str, Any]:
    """Read the ``config.yaml`` of a run folder.

    Raises:
        ConfigError: If it is not one.
    """
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(
            f"expected the config of a run at '{path}', got {type(error).__name__}: repair or "
            "remove the file."
        ) from error
    if not isinstance(config, dict) or not {"data", "seed"} <= config.keys():
        raise ConfigError(
            f"expected the config of a run at '{path}', got a file without data and seed: give "
            "the data on the command line and remove the file, or put the run's own there."
        )
    return config


def explain(error: BaseException) -> str:
    """Return what a user should read of ``error``."""
    text = " ".join(str(error).split())
    if isinstance(error, QatError):
        return text
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    if isinstance(error, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or text
        return f"expected a value for {key}, got none: add {key}=... to the command."
    if isinstance(error, OSError):
        return (
            f"expected files and folders that can be read and written, got {type(error).__name__} "
            f"({text}): free space, correct the path, or choose a folder with hydra.run.dir=..."
        )
    return f"expected a configuration that composes, got: {text} (--help lists groups and keys)."


def _explain_missing(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    known = (path.stem for path in (find_folder("conf") / group).glob("*.yaml"))
    options = list(error.options or sorted(known))  # Hydra gives none for a word in a list
    near = difflib.get_close_matches(name, options, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(options)}."
    return f"expected the name of a {group or 'config'}, got '{name}': {hint}"
