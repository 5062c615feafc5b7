"""Arguments and tables of the training benchmarks."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from show import check_plot, save_bars

from qat.files import write_text

COLUMNS = {
    "step": ("network", "mode", "median_ms", "ratio_to_float", "ratio_to_float_compiled"),
    "memory": ("network", "mode", "peak_bytes", "memory_ratio"),
    "op": ("network", "mode", "gigabytes_s", "ratio_to_copy"),
    "startup": ("network", "mode", "part", "seconds"),
}


BARS = {
    "step": "ratio_to_float",
    "memory": "memory_ratio",
    "op": "ratio_to_copy",
    "startup": "seconds",
}
"""What is plotted."""


def parse(argv: list[str] | None, text: str | None, epilog: str) -> argparse.Namespace:
    """Return the checked arguments of a training benchmark."""
    parser = argparse.ArgumentParser(
        description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    from machine import usable_cores

    parser.add_argument("--networks", type=_names, metavar="A,B", help="default: all")
    parser.add_argument("--modes", type=_names, metavar="A,B", help="default: all")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each mode (default: 8)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write bars as an image")
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="show what --json wrote; measure nothing",
    )
    parser.add_argument("--into", type=Path, metavar="PAGE", help="a page with this one's marks")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_args(argv)


def chosen(given: list[str] | None, known: Iterable[str], option: str) -> list[str]:
    """Return what an option lists, or all that is known.

    Raises:
        ConfigError: If a name is unknown.
    """
    from qat.errors import ConfigError

    names = list(known)
    for name in given or ():
        if name not in names:
            raise ConfigError(
                f"expected {option} among {', '.join(names)}, got '{name}': correct it."
            )
    return given or names


Run = Callable[[argparse.Namespace], list[dict[str, Any]]]


def run_guarded(kind: str, run: Run, argv: list[str] | None, text: str | None, epilog: str) -> int:
    """Parse the arguments, run and show the rows; a mistake ends in one sentence."""
    options = parse(argv, text, epilog)
    from qat.cli import guard

    def show() -> int:
        if options.plot is not None:
            check_plot()
        measured = run(options) if options.rows is None else _read(options.rows)
        return finish(kind, measured, options)

    return guard(show, show_traceback=options.traceback)


def _read(paths: list[Path]) -> list[dict[str, Any]]:
    from qat.errors import ConfigError

    try:
        return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected files that --json wrote, got {error}: correct it.") from error


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def to_markdown(kind: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return what was measured on and a table of the rows."""
    import machine

    found = machine.describe(options.threads, [])
    columns = [c for c in COLUMNS[kind] if any(c in row for row in rows)]
    machine_line = (
        f"{found['processor']}, {options.threads} of {found['cores']} cores, {options.device}; "
        f"torch {found['versions']['torch']}; {time.strftime('%Y-%m-%d')}"
    )
    lines = [
        machine_line,
        "",
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    lines += ["| " + " | ".join(_cell(row, c) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, float):
        text = f"{value:.2f}" if column != "median_ms" else f"{value:.0f}"
        spread = row.get(f"{column}_quartiles", row.get(f"{column}_range"))
        return text if spread is None else f"{text} [{spread[0]:.2f}, {spread[1]:.2f}]"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def finish(kind: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """Print the rows, write them where the options say, and return the exit status."""
    if not rows:
        return 0
    text = to_markdown(kind, rows, options)
    print(text)
    if options.json is not None:
        write_text(options.json, json.dumps(rows, indent=2) + "\n")
    if options.plot is not None:
        save_bars(_panels(kind, rows), BARS[kind].replace("_", " "), options.plot)
    if options.into is not None:
        write_text(options.into, fill(options.into.read_text(encoding="utf-8"), kind, text))
    return 0


def _panels(kind: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        name = ", ".join(str(row[key]) for key in ("mode", "part") if key in row)
        panels.setdefault(row["network"], {})[name] = row[BARS[kind]]
    return panels


def fill(page: str, kind: str, text: str) -> str:
    """Return ``page`` with ``text`` between the marks of ``kind``.

    Raises:
        ConfigError: If the page does not have them.
    """
    from qat.errors import ConfigError

    start, end = f"<!-- {kind} -->", f"<!-- /{kind} -->"
    if start not in page or end not in page:
        raise ConfigError(f"expected {start} and {end} in the page, got neither: add them.")
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"
