"""The figures of a measurement as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

HEAD = ("file", "runtime", "batch", "median ms", "p99 ms", "samples/s", "times as fast")
TAIL = ("memory MB", "file MB", "load ms")
WIDTH = 160


def to_text(result: Mapping[str, Any]) -> str:
    """Return machine, settings and a table with a row for each file, runtime and batch size."""
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in (*HEAD, *TAIL):
        is_text = column in ("file", "runtime")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for file in result["files"]:
        for batch, found in file["batches"].items():
            table.add_row(*cells(file, batch, found))
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None)
    console.print(machine_line(result), markup=False, highlight=False, soft_wrap=True)
    console.print(table, markup=False, highlight=False)
    return out.getvalue().rstrip()


def machine_line(result: Mapping[str, Any]) -> str:
    """Return what was measured on, and how, in one line."""
    machine = result["machine"]
    vnni = {True: "with VNNI", False: "without VNNI", None: "VNNI unknown"}[machine["vnni"]]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    return (
        f"{machine['processor']} {vnni}, {machine['threads']} of {machine['cores']} cores; "
        f"{versions}; {result['rounds']} rounds"
    )


def cells(file: Mapping[str, Any], batch: str, found: Mapping[str, Any]) -> list[str]:
    """Return one row of the table."""
    ratio = found["times_as_fast"]
    shown = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
    return [
        file["file"],
        file["runtime"],
        batch,
        f"{found['median_ms']:.3f}",
        f"{found['p99_ms']:.3f}",
        f"{found['throughput']:,.0f}",
        shown,
        f"{file['peak_bytes'] / 1e6:,.1f}",
        f"{file['size_bytes'] / 1e6:,.2f}",
        f"{file['load_seconds'] * 1e3:,.0f}",
    ]


def check_plot() -> None:
    """Check, before anything is measured, that there is something to plot with.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    from qat.errors import ConfigError

    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ConfigError(
            f"expected matplotlib for --plot, got none ({error}): install it with pip install "
            "'qat[notebooks]', or leave out --plot."
        ) from error


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the median latencies as bars, one panel for each batch size.

    Args:
        result: What was measured.
        path: An image file, of a kind that matplotlib writes.

    Raises:
        ConfigError: If matplotlib does not write such a file.
    """
    panels = {
        f"batch {batch}": {
            f"{file['file']}, {file['runtime']}": file["batches"][batch]["median_ms"]
            for file in result["files"]
        }
        for batch in result["files"][0]["batches"]
    }
    save_bars(panels, "median latency, ms", path)


def save_bars(panels: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """Write one panel of bars for each title.

    Args:
        panels: Title to the name and value of each bar.
        label: What values are, with their unit.
        path: An image file, of a kind that matplotlib writes.

    Raises:
        ConfigError: If matplotlib does not write such a file.
    """
    from qat.errors import ConfigError

    height = 1 + 0.4 * sum(len(values) for values in panels.values())
    figure = import_module("matplotlib.figure").Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for panel, (title, values) in zip(axes, panels.items(), strict=True):
        bars = panel.barh(list(values), list(values.values()))
        panel.bar_label(bars, fmt="%.3g")
        panel.invert_yaxis()
        panel.set_title(title, loc="left")
        panel.set_xlabel(label)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(
            f"expected an image file for --plot, such as figures.png, got '{path}': rename it."
        ) from error
