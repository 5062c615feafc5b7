"""Where a command starts: a new run, or a checkpoint of the same run and of no other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qat.errors import CheckpointError, ConfigError
from qat.run_folder import CONFIG, LAST, check_free, check_unused, is_finished

log = logging.getLogger("qat")
ABSENT = "nothing"
OFF = ("None", "False", "[]")
SHOWN = 6
FREE = (
    "output_dir",
    "ckpt_path",
    "resume_changes",
    "imports",
    "keep_memory",
    "checkpointing",  # computes things again, bit for bit
    "data.num_workers",
    "export.samples",
    "export.trial",
    "logger*",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    *(
        f"callbacks.{name}.*"
        for name in (
            "best",
            "clock",
            "guard",
            "last",
            "learning_rate",
            "lines",
            "monitor",
            "probe_rate",  # what it chose is saved
            "progress",
        )
    ),
)
"""Settings that change no bit of what is trained: a resumed run may have others."""
FILES = ("export*", "target")
"""Settings of the files that are made at last: free until a run has finished."""


def find_start(config: Mapping[str, Any], folder: Path, *, is_first: bool = True) -> Path | None:
    """Return the checkpoint to go on from, ``None`` for a new run; nothing is written.

    Args:
        config: The command's settings.
        folder: The run folder.
        is_first: Whether this is the first process of the run, which has to have the folder for
            itself; the others share it.

    Raises:
        CheckpointError: If there is none, or it is another run's, or of a run that has finished.
        ConfigError: If ``resume_changes`` or ``ckpt_path`` is no word for it.
        TrainingError: If another process uses the folder, or a new run would overwrite one.
    """
    word, given = config["resume_changes"], config["ckpt_path"]
    if word not in ("refuse", "allow"):
        raise ConfigError(
            f"expected resume_changes=refuse or resume_changes=allow, got {word!r}: correct it."
        )
    if is_first:
        check_unused(folder)
    if given is None:
        if is_first:
            check_free(folder)
        return None
    path = _checkpoint(given, folder)
    if is_first:
        _check_same(path, config, folder, allowed=word == "allow")
    return path


def _checkpoint(given: Any, folder: Path) -> Path:
    if not isinstance(given, str):
        raise ConfigError(
            f"expected ckpt_path=last or the path of a .ckpt file, got {given!r}: correct it."
        )
    path = folder / LAST if given == "last" else Path(given)
    if path.is_file():
        return path
    if given == "last" and (folder / CONFIG).is_file():
        raise CheckpointError(
            f"expected a checkpoint to resume from, got none yet in '{folder}', the newest run: "
            "start it again without ckpt_path, or give the path of an older .ckpt file."
        )
    raise CheckpointError(
        f"expected a checkpoint to resume from, got none at '{path}': start the run without "
        "ckpt_path, or give the path of a .ckpt file."
    )


def _check_same(path: Path, config: Mapping[str, Any], folder: Path, *, allowed: bool) -> None:
    from qat.training.checkpoint_io import read_settings

    own = path.resolve().is_relative_to(folder.resolve())
    if not own:
        check_free(folder)
    finished = own and is_finished(folder)
    changed = differences(read_settings(path), config, () if finished else FILES)
    if finished and (changed or path.resolve() != (folder / LAST).resolve()):
        what = f"other settings ({listed(changed)})" if changed else f"'{path}' to go on from"
        raise CheckpointError(
            f"expected a checkpoint of this very run, got {what} for the run in '{folder}', which "
            "has finished: its files stay as they are; start a new run without ckpt_path, go on in "
            "another folder with hydra.run.dir=..., or use scripts/export.py for other files."
        )
    if changed and not allowed:
        raise CheckpointError(
            f"expected a checkpoint of this very run, got '{path}' of one with other settings "
            f"({listed(changed)}): repeat the run's own command, start a new run without "
            "ckpt_path, or go on with the new settings by resume_changes=allow."
        )
    if changed:
        log.warning("going on with other settings: %s", listed(changed))


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...] = ()
) -> dict[str, tuple[str, str]]:
    """Return the settings that differ, with both values, those of callbacks at last.

    Args:
        old: The config of a run.
        new: Another one.
        free: Patterns of keys to leave out, beside ``FREE``.
    """
    first, second = _flat(old), _flat(new)
    pairs = {
        key: (first.get(key, ABSENT), second.get(key, ABSENT))
        for key in sorted({*first, *second}, key=lambda k: (k.startswith("callbacks."), k))
        if not any(fnmatchcase(key, pattern) for pattern in (*FREE, *free))
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not _is_off(pair)}


def _is_off(pair: tuple[str, str]) -> bool:
    """Whether one side lacks a key, as older runs do, and the other has it switched off."""
    return ABSENT in pair and any(value in OFF for value in pair)


def listed(changed: Mapping[str, tuple[str, str]]) -> str:
    """Return differences as words: ``seed: 0 -> 7``."""
    shown = [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]
    more = len(shown) - SHOWN
    return ", ".join(shown[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Return values under dotted keys, as text: 1 and 1.0 are other milestones, NaN is itself."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: repr(value)}
    result: dict[str, str] = {}
    for key, inner in value.items():
        if prefix != "callbacks" or inner:  # entries that are switched off
            result |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return result
