"""Reports of run folders, grouped: runs of one name and the same settings are seeds of one row."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qat.errors import DataError, reason
from qat.resume import ABSENT, differences
from qat.stored_config import check_yaml

Report = dict[str, Any]
FREE = ("seed", "name", "data.root", "data.path")
"""Settings that do not tell rows apart: where the same data lie, and what seeds and names are."""


@dataclass(frozen=True)
class Run:
    """A report and the settings that its run had; none where ``config.yaml`` is missing."""

    report: Report
    settings: Mapping[str, Any]

    @property
    def seed(self) -> str:
        """The seed, as rows show it."""
        return str(self.report["details"]["seed"])


def read_text(
    path: Path, parse: Callable[[str], Any], use: Callable[[Any], object]
) -> dict[str, Any]:
    """Return what a file holds, once ``use`` could read from it what a table shows.

    Raises:
        DataError: If it could not.
    """
    try:
        found = parse(path.read_text(encoding="utf-8"))
        use(found)
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(
            f"expected results as qat writes them in '{path}', got {reason(error)}: leave the file "
            "out, or make it again."
        ) from error
    return found


def read_json(path: Path, use: Callable[[Any], object]) -> Report:
    """Return what a file of JSON holds, once ``use`` could read from it what a table shows.

    Raises:
        DataError: If it could not.
    """
    return read_text(path, json.loads, use)


def read_runs(folders: Sequence[Path], use: Callable[[Any], object]) -> dict[str, list[Report]]:
    """Return each row's label and its reports, the newest of every seed; none that failed.

    The label is the run's name; of several settings under one name, those of most runs (then the
    oldest) have it alone, and others say what they have instead.

    Args:
        folders: Searched through for ``report.json``.
        use: What a table needs of a report.

    Raises:
        DataError: If there is no such folder, or a report is none of ours.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise DataError(f"expected folders of runs, got '{missing[0]}': correct the path.")
    paths = [path for folder in folders for path in folder.rglob("report.json")]
    named: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(paths, key=lambda p: p.stat().st_mtime):
        report = read_json(path, lambda found: (found["passed"], found["name"].strip(), use(found)))
        if report["passed"] is not False:
            named[report["name"]].append(Run(report, _settings(path.with_name("config.yaml"))))
    rows: dict[str, list[Report]] = {}
    for name, runs in sorted(named.items()):
        for label, group in _labelled(name, runs).items():
            newest = {run.seed: run.report for run in group}
            rows[label] = [newest[seed] for seed in sorted(newest)]
    return rows


def _settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    check_yaml(path)
    return read_text(path, yaml.safe_load, lambda found: found.items())


def _labelled(name: str, runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the groups of runs with the same settings, by labels that tell them apart."""
    groups: list[list[Run]] = []
    for run in runs:
        same = (group for group in groups if not _differences(group[0], run))
        found = next(same, None)
        groups.append([run]) if found is None else found.append(run)
    groups.sort(key=len, reverse=True)  # stable: the oldest first among equals
    first, *others = groups
    labelled = {name: first}
    for group in others:
        label = ", ".join([name, *_words(_differences(first[0], group[0]))])
        while label in labelled:
            label += "'"
        labelled[label] = group
    return labelled


def _differences(first: Run, second: Run) -> dict[str, tuple[str, str]]:
    """Return the settings that differ; keys at the top that one version lacks say nothing."""
    found = differences(first.settings, second.settings, FREE)
    return {k: pair for k, pair in found.items() if "." in k or ABSENT not in pair}


def _words(changed: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return differences as ``key=value``, without those that only refer to another."""
    kept: dict[tuple[str, str], str] = {}
    for key, pair in changed.items():
        is_word = pair[1].startswith("'")
        kept.setdefault(pair if is_word else (key, pair[1]), f"{key}={pair[1].strip(chr(39))}")
    return [word.replace("|", "/") for word in kept.values()]
