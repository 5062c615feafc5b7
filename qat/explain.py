"""Words of the command line that cannot be read, and sentences for what Hydra says of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from qat.errors import ConfigError, QatError
from qat.folders import find_folder
from qat.settings.names import flatten, no_key

MISTAKES = (HydraException, OmegaConfBaseException, YAMLError)
"""What Hydra and OmegaConf raise where a user's words are wrong."""


def is_override(word: str) -> bool:
    """Whether a word of the command line is an override, and no option or its value."""
    return word.startswith(("~", "+", "=")) or ("=" in word and not word.startswith("-"))


def check_words(overrides: Sequence[str]) -> None:
    """Refuse overrides that cannot be read, and groups set to what is no name.

    Args:
        overrides: What stands on the command line, without options.

    Raises:
        ConfigError: If there is one.
    """
    groups = {path.name for path in find_folder("conf").iterdir() if path.is_dir()} | {"recipe"}
    for override in overrides:
        try:
            (parsed,) = OverridesParser.create().parse_overrides([override])
        except MISTAKES as error:
            raise ConfigError(explain(error, override)) from error
        key, value = parsed.key_or_group, parsed.value()
        if not key:
            raise ConfigError(
                f"expected overrides such as seed=1, got '{override}': write its key in front."
            )
        is_name = isinstance(value, str | list | dict | QuotedString) or parsed.is_sweep_override()
        if key in groups and not is_name and not parsed.is_delete():
            raise ConfigError(
                f"expected the name of a {key}, got '{override}': choose one, or leave it out "
                "(--help lists them)."
            )


def explain(error: BaseException, override: str = "") -> str:
    """Return what a user should read of ``error``.

    Args:
        error: What was raised.
        override: Which word of the command line it is about, if that is known.
    """
    text = " ".join(str(error).split())
    if isinstance(error, QatError):
        return text
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    if isinstance(error, OverrideParseException):
        return (
            f"expected overrides such as seed=1, got '{override or error.override}': close what "
            "is open, and quote what has special characters, such as 'name=\"a,b\"'."
        )
    if isinstance(error, ConfigCompositionException):
        return _explain_override(error, text)
    if isinstance(error, RecursionError):
        return "expected values that end, got some that are nested too deep: correct them."
    if isinstance(error, OmegaConfBaseException):
        return _explain_value(error, text)
    if isinstance(error, OSError):
        return (
            f"expected files and folders that can be read and written, got {type(error).__name__} "
            f"({text}): free space, correct the path, or choose a folder with hydra.run.dir=..."
        )
    return f"expected a configuration that composes, got: {text} (--help lists groups and keys)."


def _explain_value(error: OmegaConfBaseException, text: str) -> str:
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return (
            f"expected a value for {key or text}, got none: add {key or text}=... to the command."
        )
    what = text.partition(" full_key:")[0]
    ours = re.fullmatch(r"(\w+) raised while resolving interpolation: (.*)", what)
    if ours and ours[1] in ("ConfigError", "CheckpointError"):  # of a resolver of ours
        return ours[2]
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        return f"expected {key or 'values'} to refer to what exists, got: {what}: correct it."
    return f"expected a configuration that composes, got: {what} (--help lists groups and keys)."


def _explain_override(error: ConfigCompositionException, text: str) -> str:
    quoted = re.search(r"'([^']*)'", text)
    word = quoted[1] if quoted else text
    if text.startswith(("Could not override", "Could not delete")):
        key = getattr(error.__cause__, "full_key", None) or word
        return str(no_key(key, _conf_keys()))
    if text.startswith("Could not append"):
        return f"expected + in front of a new key only, got +{word}, which exists: leave the + out."
    if text.startswith(("Ambiguous", "Sweep parameters")):
        return (
            f"expected one value, got '{word}': choose one, quote it as '\"...\"', or add "
            "--multirun to run all."
        )
    return f"expected a configuration that composes, got: {text} (--help lists groups and keys)."


def _conf_keys() -> list[str]:
    """Return the dotted names of all keys in the files of ``conf``."""
    found: dict[str, None] = {}
    conf = find_folder("conf")
    for path in sorted(conf.rglob("*.yaml")):
        group = "" if path.parent == conf else f"{path.parent.name}."
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        found |= dict.fromkeys([group.rstrip("."), *flatten(values, group)])
    return [key for key in found if key and "defaults" not in key]


def _explain_missing(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    known = (path.stem for path in (find_folder("conf") / group).glob("*.yaml"))
    options = list(error.options or sorted(known))  # Hydra gives none for a word in a list
    near = difflib.get_close_matches(name, options, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(options)}."
    return f"expected the name of a {group or 'config'}, got '{name}': {hint}"
