"""Compare all files of two runs; what may differ stands here and nowhere else."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from qat.compose import read_config
from qat.resume import differences

TIMES = re.compile(r"\| (\w+ \| [\d.]+|date \| [\d-]+) \|\n")
NAMES = re.compile(r"events\.out\.tfevents\..*")


def apart(one: Path, two: Path) -> list[str]:
    """Return the files that one run has otherwise than the other, or alone."""
    files = [{_name(p, run): p for p in run.rglob("*") if p.is_file()} for run in (one, two)]
    alone = sorted(files[0].keys() ^ files[1].keys())
    both = sorted(files[0].keys() & files[1].keys())
    changed = [name for name in both if not _same(files[0][name], files[1][name])]
    return [f"only in one: {name}" for name in alone] + changed


def _name(path: Path, run: Path) -> str:
    return NAMES.sub("events", str(path.relative_to(run)))


def _same(a: Path, b: Path) -> bool:
    if a.name == ".lock":
        return a.read_text() == b.read_text() == ""  # nobody is there
    if a.name == "config.yaml":
        configs = [read_config(path) for path in (a, b)]
        kills = [{k: v for k, v in c["callbacks"].items() if "kill" not in k} for c in configs]
        return not differences(
            *({**c, "callbacks": k} for c, k in zip(configs, kills, strict=True))
        )
    read = {".ckpt": _checkpoint, ".json": _report, ".md": _markdown}.get(a.suffix, _bytes)
    read = _events if NAMES.fullmatch(a.name) else read
    return _plain(read(a)) == _plain(read(b))


def _bytes(path: Path) -> Any:
    return path.read_bytes()


def _report(path: Path) -> Any:
    values = json.loads(path.read_text())
    values.pop("seconds", None)  # of the clock
    values.get("details", {}).pop("date", None)
    return values


def _markdown(path: Path) -> Any:
    return TIMES.sub("", path.read_text())


def _checkpoint(path: Path) -> Any:
    saved = torch.load(path, weights_only=True)
    saved["callbacks"].pop("Clock", None)
    saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if "Kill" not in k}
    saved.pop("hyper_parameters")  # as config.yaml
    saved["callbacks"].get("LogPositions", {}).pop("RunTensorBoard", None)  # has a time
    return saved


def _events(path: Path) -> Any:
    events = []
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        tags = [value.tag for value in event.summary.value]
        if not any(tag.startswith("_hparams_/") for tag in tags):  # start and end of the session
            event.wall_time = 0
            events.append(event.SerializeToString(deterministic=True))
    return events


def _plain(value: Any) -> Any:
    """Return a value that ``==`` compares; the folder of a path does not count."""
    if torch.is_tensor(value):
        return (value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str) and value.startswith("/"):
        return value.rpartition("/")[2]
    if isinstance(value, str):
        return value
    return repr(value)
