"""From the words of a command line to a config: groups, recipes, and sentences for mistakes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torchvision
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qat.errors import ConfigError
from qat.explain import MISTAKES, check_words, explain
from qat.extensions import import_modules
from qat.folders import find_folder
from qat.kinds import FILE, FOLDER_NAME, NULL, require
from qat.run_folder import run_dir
from qat.stored_config import check_stored, check_yaml

DATA_KEYS = ("data", "recipe", "seed")
STORED_KEYS = ("data", "seed")


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
    OmegaConf.register_new_resolver("qat_run_dir", _run_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("qat_name", _folder_name, replace=True)
    OmegaConf.register_new_resolver("qat_rate", _rate, replace=True)


def _folder_name(name: object) -> str:
    require("name", name, FOLDER_NAME)
    return str(name)


def _rate(rate: float, ckpt: object) -> float | str:
    """Return a default rate: what is given for models that a run trains itself is probed first.

    A rate that suits them may be far too high for weights of any other origin.
    """
    return rate if ckpt is None else f"up to {rate:g}"


def _run_dir(name: object, ckpt_path: Any) -> str:
    """Check what comes before folders are made of it: Hydra makes them in front of the run."""
    require("ckpt_path", ckpt_path, FILE | NULL)
    return run_dir(_folder_name(name), ckpt_path)


def compose(overrides: Sequence[str], output_dir: Path) -> DictConfig:
    """Compose a config as the command line would, for scripts and tests.

    Args:
        overrides: What would stand on the command line, such as ``recipe=resnet_w4a8``.
        output_dir: The run folder.

    Raises:
        ConfigError: If it does not compose.
    """
    register()
    check_words(overrides)
    conf = str(find_folder("conf").resolve())
    try:
        with hydra.initialize_config_dir(conf, version_base="1.3"):
            return hydra.compose("config", [*overrides, f"output_dir='{output_dir}'"])
    except MISTAKES as error:
        raise ConfigError(explain(error)) from error


def resolve(cfg: DictConfig, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """Return a config as plain values.

    Args:
        cfg: What ``compose`` or Hydra returned.
        keys: Names at its top, such as ``model``; all, if ``None``.

    Raises:
        ConfigError: If a value is missing or refers to one that is not there.
    """
    try:
        return {key: _plain(cfg, key) for key in keys or map(str, cfg)}
    except (*MISTAKES, RecursionError) as error:
        raise ConfigError(explain(error)) from error


def plain(cfg: DictConfig, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a config as plain values, checked: every key exists, every value is of its kind.

    Keys of the user's own at the top are let pass where other values refer to them.

    Args:
        cfg: What ``compose`` or Hydra returned.
        keys: Names at its top, such as ``model``; all, if ``None``.

    Raises:
        ConfigError: If a value is missing or of another kind, a key unknown, or a module of
            ``imports`` cannot be imported.
        CheckpointError: If ``ckpt_path`` is a file, but no checkpoint.
    """
    import_modules(resolve(cfg, ["imports"])["imports"])  # what they register has words
    from qat.settings.check import check  # imports Lightning, which --help does not need

    values = resolve(cfg, keys)
    check(values, keys, own=set(re.findall(r"\$\{(\w+)[.}]", OmegaConf.to_yaml(cfg))))
    return values


def compose_plain(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a config as plain values, for scripts that train nothing.

    Args:
        overrides: What would stand on the command line.

    Raises:
        ConfigError: If it does not compose, or a value is missing.
    """
    return plain(compose(overrides, Path()))


def compose_parts(overrides: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Compose a config and return only ``keys``; values that others lack are not asked for.

    Args:
        overrides: What would stand on the command line.
        keys: Names at the top of the config, such as ``model``.

    Raises:
        ConfigError: If it does not compose, or one of them lacks a value.
    """
    cfg = compose(overrides, Path())
    lacking = {key.partition(".")[0] for key in OmegaConf.missing_keys(cfg)}
    values = plain(cfg, [*keys, *(k for k in map(str, cfg) if k not in {*keys, *lacking})])
    return {key: values[key] for key in keys}


def compose_data(
    overrides: Sequence[str],
    run: Mapping[str, Any] | None,
    source: Path,
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Return ``data`` and ``seed``, for scripts whose model comes from a file.

    Args:
        overrides: ``data=...`` or ``recipe=...`` chooses other data than the run's; without
            either, keys such as ``data.batch_size=8`` change the run's.
        run: The config that the file was trained with, if it is known.
        source: The file that ``run`` comes from.
        allow: What ``run`` may build beside what our own configs name.

    Raises:
        ConfigError: If an override is about anything else, the config does not compose, or
            ``run`` would build what nobody named.
    """
    _refuse_others(overrides, DATA_KEYS)
    given: list[str] = []
    is_stored = run is not None and not any(o.startswith(("data=", "recipe=")) for o in overrides)
    if run is not None:
        given.append(f"seed={run['seed']}")
    if run is not None and is_stored:
        check_stored(run, ["data"], source, allow)
        ConfigStore.instance().store(name="_run", group="data", node=dict(run["data"]))
        given.append("data=_run")
    cfg = compose([*given, *overrides], Path())
    return resolve(cfg, STORED_KEYS) if is_stored else plain(cfg, STORED_KEYS)


def compose_export(
    overrides: Sequence[str], run: Mapping[str, Any], source: Path, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Return ``data``, ``seed`` and ``export``, to export a model of a file once more.

    Args:
        overrides: What ``compose_data`` takes, and changes of the run's ``export``, such as
            ``export.storage=size``.
        run: The config that the file was trained with.
        source: The file that ``run`` comes from.
        allow: What ``run`` may build beside what our own configs name.

    Raises:
        ConfigError: If an override is about anything else, the config does not compose, or
            ``run`` would build what nobody named.
    """
    _refuse_others(overrides, ("data", "export", "recipe", "seed"))
    own = [override for override in overrides if _group(override) == "export"]
    data = compose_data(
        [override for override in overrides if override not in own], run, source, allow
    )
    check_stored(run, ["export"], source, allow)
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


def _plain(cfg: DictConfig, key: str) -> Any:
    node = cfg[key]
    if not OmegaConf.is_config(node):
        return node
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


def read_config(path: Path) -> dict[str, Any]:
    """Read the ``config.yaml`` of a run folder.

    Raises:
        ConfigError: If it is not one.
    """
    check_yaml(path)
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(
            f"expected the config of a run at '{path}', got {type(error).__name__}: repair or "
            "remove the file."
        ) from error
    parts = config if isinstance(config, dict) else {}
    if not isinstance(parts.get("data"), dict) or type(parts.get("seed")) is not int:
        raise ConfigError(
            f"expected the config of a run at '{path}', got a file without data and seed: give "
            "the data on the command line and remove the file, or put the run's own there."
        )
    return config
