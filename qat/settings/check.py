"""The check of a composed config against the table, before anything is built or read."""

from __future__ import annotations

import inspect
import math
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from qat.errors import CheckpointError, ConfigError
from qat.kinds import FLAG, Kind, require, show, words
from qat.settings.names import flatten, no_key
from qat.settings.signature import Signature, locate, signature
from qat.settings.table import MODEL, TABLE, Built, Group, Model, Named, Words
from qat.training.task import METRICS

OURS = ("qat.", "pytorch_lightning.")
OF_HYDRA = {
    "_target_": Kind("a dotted name", lambda value: isinstance(value, str)),
    "_partial_": FLAG,
    "_recursive_": FLAG,
    "_convert_": words("none", "partial", "object", "all"),
    "_args_": Kind("a list", lambda value: isinstance(value, list)),
}
MAPPING = Kind("keys with values", lambda value: isinstance(value, Mapping))


def check(
    config: Mapping[str, Any], keys: Collection[str] | None = None, own: Collection[str] = ()
) -> None:
    """Refuse a config with an unknown key or a value that is not of its kind.

    Args:
        config: A resolved config, plain values.
        keys: The groups to look at; all, if ``None``.
        own: Names at the top that are the user's own, for interpolation.

    Raises:
        ConfigError: For the first mistake, with its key.
        CheckpointError: If ``ckpt_path`` is a file, but no checkpoint.
    """
    own = set(own) - TABLE.keys.keys()
    chosen = {k: node for k, node in TABLE.keys.items() if keys is None or k in keys}
    seen = {k: v for k, v in config.items() if k not in own and (keys is None or k in keys)}
    checker = _Checker([name for name in flatten(config) if name.partition(".")[0] not in own])
    checker.group("", seen, Group(chosen))
    _check_monitors(seen.get("callbacks") or {})
    _check_resume(seen.get("ckpt_path"))


def _check_monitors(callbacks: Mapping[str, Any]) -> None:
    """Refuse metrics that nobody logs; callbacks of others may log any."""
    nodes = {name: node for name, node in callbacks.items() if node}
    if all(str(node.get("_target_")).startswith(OURS) for node in nodes.values()):
        for name, node in nodes.items():
            if node.get("monitor") is not None:
                require(f"callbacks.{name}.monitor", node["monitor"], words(*METRICS))


def _check_resume(ckpt_path: str | None) -> None:
    path = Path(ckpt_path or "last")
    if str(path) != "last" and path.is_file() and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"expected ckpt_path to be a checkpoint of a run, got '{path}', which is empty, cut "
            "off or of another kind: give checkpoints/last.ckpt of the run, or leave ckpt_path out."
        )


class _Checker:
    """Walk through a config and the table side by side."""

    def __init__(self, known: list[str]) -> None:
        self.known = known

    def node(self, key: str, value: Any, node: Any) -> None:
        """Check one value, whatever the table has for it."""
        if isinstance(node, Kind):
            self.leaf(key, value, node)
        elif isinstance(node, Group):
            self.group(key, value, node)
        elif isinstance(node, Built):
            self.built(key, value, node)
        elif isinstance(node, Named):
            self.named(key, value, node)
        elif isinstance(node, Words):
            self.leaf(key, value, _known(node.classes))
        elif isinstance(node, Model):
            self.model(key, value, node)

    def leaf(self, key: str, value: Any, kind: Kind) -> None:
        _check_finite(key, value)
        require(key, value, kind)

    def group(self, key: str, value: Any, node: Group) -> None:
        if node.may_be is not None and node.may_be.fits(value):
            return
        mapping = Kind(node.wanted, MAPPING.fits)
        require(key, value, mapping | node.may_be if node.may_be else mapping)
        for name, child in node.keys.items():
            if name in value:
                self.node(_join(key, name), value[name], child)
            elif name not in node.optional:
                raise ConfigError(f"expected a value for {_join(key, name)}, got none: add it.")
        for name in value.keys() - node.keys.keys():
            if node.others is None or not isinstance(name, str):
                raise self._unknown(key, name, node.keys)
        for name in [name for name in value if name not in node.keys]:
            self.node(_join(key, name), value[name], node.others)

    def built(self, key: str, value: Any, node: Built) -> None:
        if node.may_be_nothing and (value is None or value == {}):
            return
        require(key, value, MAPPING)
        base = locate(node.base, key)
        if not node.is_base and "_target_" not in value:
            raise ConfigError(
                f"expected {key} to name a {base.__name__} as _target_, got {show(dict(value))}: "
                f"add {key}._target_=..., or choose a group ({key}=...; --help lists them)."
            )
        target = base if node.is_base else locate(value["_target_"], key)
        if inspect.isclass(target) and not issubclass(target, base):
            raise ConfigError(
                f"expected {key}._target_ to be a {base.__name__}, got {value['_target_']}: "
                "correct it."
            )
        for name in value.keys() & OF_HYDRA.keys():
            require(_join(key, name), value[name], OF_HYDRA[name])
        given = {name: child for name, child in value.items() if name not in OF_HYDRA}
        self.arguments(key, given, signature(target), node)

    def arguments(self, key: str, given: Mapping[str, Any], takes: Signature, node: Built) -> None:
        for name, value in given.items():
            if name in node.set_elsewhere:
                raise ConfigError(
                    f"No key {_join(key, name)}: {node.set_elsewhere[name]} sets it; remove it."
                )
            if name not in takes.kinds and not takes.is_open:
                raise self._unknown(key, name, takes.kinds.keys() - node.set_elsewhere.keys())
            kind = node.kinds.get(name) or takes.kinds.get(name)
            if _has_target(value) and name not in node.kinds:
                self.nested(_join(key, name), value, node)
            elif kind is not None:
                self.leaf(_join(key, name), value, kind)
            else:
                _check_finite(_join(key, name), value)

    def nested(self, key: str, value: Any, node: Built) -> None:
        """Check what is built inside of what is built."""
        if isinstance(value, Mapping) and "_target_" in value:
            self.built(key, value, Built("builtins.object", node.set_elsewhere))
            return
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, child in items:
            if _has_target(child):
                self.nested(_join(key, str(name)), child, node)

    def named(self, key: str, value: Any, node: Named) -> None:
        if not isinstance(value, Mapping):
            require(key, value, _known(node.classes))
            return
        if "name" not in value:
            raise ConfigError(f"expected a value for {key}.name, got none: add it.")
        require(f"{key}.name", value["name"], _known(node.classes))
        options = {name: child for name, child in value.items() if name != "name"}
        takes = signature(node.classes[value["name"]])
        allowed = {k: kind for k, kind in takes.kinds.items() if k not in node.set_elsewhere}
        self.arguments(key, options, Signature(allowed, is_open=takes.is_open), Built("object"))

    def model(self, key: str, value: Any, node: Model) -> None:
        require(key, value, MAPPING)
        if "_target_" in value:
            self.built(key, {k: v for k, v in value.items() if k != "name"}, node.built)
            return
        require(f"{key}.name", value.get("name"), MODEL)
        builder = node.builders.get(value["name"])
        takes = signature(builder) if builder is not None else Signature({}, is_open=True)
        self.arguments(key, {k: v for k, v in value.items() if k != "name"}, takes, node.built)

    def _unknown(self, key: str, name: object, siblings: Iterable[str]) -> ConfigError:
        wrong = _join(key, str(name))
        others = [k for k in self.known if k != wrong and not k.startswith(f"{wrong}.")]
        return no_key(wrong, [*(_join(key, sibling) for sibling in sorted(siblings)), *others])


def _known(classes: Mapping[str, Any]) -> Kind:
    """Return the kind of words that are registered now."""
    kind = words(*classes)
    return Kind(f"{kind.wanted} or what a module of imports registers", kind.fits, kind.words)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _check_finite(key: str, value: Any) -> None:
    """Refuse NaN and infinity, wherever they stand."""
    children = value.items() if isinstance(value, Mapping) else []
    children = enumerate(value) if isinstance(value, list) else children
    for name, child in children:
        _check_finite(f"{key}.{name}", child)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"expected {key} to be finite, got {value}: correct it.")
