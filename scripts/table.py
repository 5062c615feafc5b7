"""Fill the results table and the recipes' headers from run folders: no figure is ever typed.

Of every recipe and its settings the newest run that passed counts; several seeds give mean and
deviation. Rows of a page whose runs are not in these folders stay as they are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from run_groups import read_json, read_runs

from qat.files import write_text
from qat.terminal import show, terminal

MARKS = {kind: (f"<!-- {kind} -->", f"<!-- /{kind} -->") for kind in ("results", "full", "peers")}
KEYS = {"results": 1, "full": 1, "peers": 2}
"""How many of the first cells tell a row from others."""
MEASURED = "# Measured: "
HEAD = (
    "run",
    "epochs",
    "seeds",
    "float %",
    "fake-quant %",
    "onnxruntime %",
    "least agreement %",
    "float bytes",
    "packed bytes",
    "seconds",
    "date",
    "machine",
)


def spread(values: list[float], digits: int = 2) -> str:
    """Return the mean, and the deviation where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def least_agreement(reports: list[dict[str, Any]]) -> str:
    """Return the least agreement of the files, percent; studies have none."""
    shares = [r["agreement"]["onnxruntime"] for r in reports if "agreement" in r]
    return f"{100 * min(shares):.2f}" if shares else "-"


def row(name: str, reports: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the cells of one run; studies among its seeds have no files."""
    last = reports[-1]
    packed = [r["size_bytes"]["safetensors"] for r in reports if "safetensors" in r["size_bytes"]]

    def accuracy(kind: str) -> str:
        known = [r["accuracy"][kind] for r in reports if kind in r["accuracy"]]
        count = f" ({len(known)} of {len(reports)} seeds)" if len(known) < len(reports) else ""
        return f"{spread(known)}{count}" if known else "-"

    return (
        name,
        last["details"].get("epochs", "-"),
        ", ".join(str(r["details"]["seed"]) for r in reports),
        accuracy("float"),
        accuracy("fake_quant"),
        accuracy("onnxruntime"),
        least_agreement(reports),
        f"{last['size_bytes']['float']:,}",
        f"{packed[-1]:,}" if packed else "-",
        spread([sum(r["seconds"].values()) for r in reports]),
        last["details"].get("date", "-"),
        last["details"].get("machine", "-"),
    )


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of runs as Markdown."""
    return markdown(HEAD, [row(*item) for item in runs.items()])


def peers_table(paths: list[Path], runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of what ``peers.py`` wrote, below the run whose name ends in its width."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    read = [read_json(path, lambda p: (f"{p['lr']:g}", p["fake_quant"] + 0.0)) for path in paths]
    for peer in sorted(read, key=lambda p: p["seed"]):
        found[peer["bits"]][f"{peer['method']}, rate {peer['lr']:g}"].append(peer)
    rows = []
    for bits, methods in sorted(found.items(), reverse=True):
        ours = [r for name, reports in runs.items() if name.endswith(f"_{bits}") for r in reports]
        if ours:
            rows.append((bits, "qat", *_shown([(r["details"]["seed"], _ours(r)) for r in ours])))
        for method, peers in sorted(methods.items()):
            rows.append((bits, method, *_shown([(p["seed"], p["fake_quant"]) for p in peers])))
    return markdown(("bits", "trained by", "seeds", "accuracy %"), rows)


def _ours(report: dict[str, Any]) -> float:
    return report["accuracy"]["fake_quant"]


def _shown(results: list[tuple[int, float]]) -> tuple[str, str]:
    return ", ".join(str(seed) for seed, _ in results), spread([value for _, value in results])


def fill(page: str, text: str, kind: str = "results") -> str:
    """Put the rows of ``text`` between the marks of its kind in ``page``, beside other rows."""
    start, end = MARKS[kind]
    before, _, rest = page.partition(start)
    old, _, after = rest.partition(end)
    return f"{before}{start}\n{merged(old, text, KEYS[kind])}\n{end}{after}"


def merged(old: str, new: str, keys: int) -> str:
    """Return the table ``new`` with those rows of ``old`` that it has not, in the order of ``old``.

    Args:
        old: A table with the same columns, or text that is none.
        new: A table.
        keys: How many of the first cells tell a row from others.
    """

    def rows(table: str) -> dict[tuple[str, ...], str]:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        return {tuple(line.split("|")[1 : 1 + keys]): line for line in lines}

    both = rows(old) | rows(new) if old.strip().startswith(new.splitlines()[0]) else rows(new)
    head, line, *body = both.values()
    return "\n".join([head, line, *(sorted(body) if keys == 1 else body)])


def measured(reports: list[dict[str, Any]]) -> str:
    """Return the header line of a recipe: what to expect, of which seeds, when and where."""
    _, _, seeds, in_float, _, integers, agreement, _, _, seconds, date, machine = row("", reports)
    return (
        f"{MEASURED}float {in_float} %, onnxruntime {integers} %, agreement {agreement} %, "
        f"seed {seeds}; {seconds} s\n#   on {machine}; {date}.{perplexities(reports)}"
    )


def perplexities(reports: list[dict[str, Any]]) -> str:
    """Return one more line of that header: what calibration costs, and what training saves."""
    found = {
        kind: [r["perplexity"][kind] for r in reports if kind in r.get("perplexity", {})]
        for kind in ("float", "post_training", "onnxruntime")
    }
    if not all(found.values()):
        return ""
    shown = [f"{kind.replace('_', '-')} {spread(values, 3)}" for kind, values in found.items()]
    return f"\n#   Perplexity: {', '.join(shown)}."


def stamp(recipe: str, line: str) -> str:
    """Put ``line`` at the end of the comments that open a recipe, in place of an older one."""
    lines = recipe.splitlines()
    head = lines[: lines.index("defaults:")]
    old = next((i for i, text in enumerate(head) if text.startswith(MEASURED)), len(head))
    return "\n".join([*head[:old], line, *lines[len(head) :]]) + "\n"


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser, for mistakes found later, and the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, searched through")
    parser.add_argument("--into", type=Path, help="a page with <!-- results --><!-- /results -->")
    parser.add_argument(
        "--marks", choices=("results", "full"), default="results", help="those of the table of runs"
    )
    parser.add_argument("--recipes", type=Path, help="a folder of recipes whose headers to fill")
    parser.add_argument(
        "--peers", nargs="+", type=Path, metavar="FILE", help="what peers.py wrote: a second table"
    )
    return parser, parser.parse_args()


def main() -> int:
    """Run the command line; return the exit status."""
    parser, options = parse()
    from qat.cli import guard

    return guard(lambda: tables(parser, options), show_traceback=False)


def tables(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Print the table, or write it into a page that has the marks, and into recipes."""
    runs = read_runs(options.folders, lambda found: measured([found]))
    texts = {options.marks: table(runs)}
    if options.peers:
        texts["peers"] = peers_table(options.peers, runs)
    for name, reports in runs.items() if options.recipes else ():
        path = options.recipes / f"{name}.yaml"
        if path.is_file():
            write_text(path, stamp(path.read_text(encoding="utf-8"), measured(reports)))
    if options.into is None:
        show("\n\n".join(texts.values()))
        return 0
    page = options.into.read_text(encoding="utf-8") if options.into.is_file() else ""
    for kind, text in texts.items():
        if not all(mark in page for mark in MARKS[kind]):
            wanted = " and ".join(MARKS[kind])
            parser.error(f"expected {wanted} in '{options.into}', got neither: add them.")
        page = fill(page, text, kind)
    write_text(options.into, page)
    return 0


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
