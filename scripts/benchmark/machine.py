"""What was measured on: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def describe(threads: int, runtimes: Sequence[str]) -> dict[str, Any]:
    """Return processor, its flags that matter to integer kernels, cores, threads and versions.

    Args:
        threads: Threads that each file may use.
        runtimes: Names of the runtimes.
    """
    from qat.runtimes.table import find_runtime

    facts = read_cpuinfo(CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else "")
    used = [find_runtime(name).package for name in runtimes]
    packages = dict.fromkeys(("qat", "torch", "onnx", "onnxruntime", *used))
    return {
        **facts,
        "cores": usable_cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def read_cpuinfo(text: str) -> dict[str, Any]:
    """Return name, known flags and whether there is VNNI, ``None`` where it is not known.

    Args:
        text: What Linux shows in ``/proc/cpuinfo``; empty elsewhere.
    """
    pairs = [line.partition(":")[::2] for line in text.splitlines() if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(pairs)}
    words = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "processor": facts.get("model name") or platform.processor() or "unknown",
        "flags": [flag for flag in FLAGS if flag in words],
        "vnni": any(word.endswith("_vnni") for word in words) if words else None,
    }


def usable_cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str) -> str:
    if name == "qat":
        import qat

        return qat.__version__
    return version(name)
