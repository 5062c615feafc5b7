"""Latency, throughput, memory and size of exported files, beside the float models of their runs.

ARTIFACT is an .onnx file or the folder of a run. For a run of ours (config.yaml beside the file)
the float model is built again, exported and measured too. Every file has a process of its own; all
take turns in every round, and "times as fast" is the ratio of a round's medians to those of the
float file (without one, of the first ARTIFACT) in the same runtime: its median and quartiles over
rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.files import write_text
from qat.terminal import terminal

if TYPE_CHECKING:
    from worker import Worker

EPILOG = """
examples:
  python scripts/benchmark/latency.py runs/resnet_w4a8/TIME --threads 1
  python scripts/benchmark/latency.py a.onnx b.onnx --float float.onnx --static
  python scripts/benchmark/latency.py model.onnx --runtime onnxruntime,openvino --json found.json
"""

Times = dict[tuple["Worker", int], list[list[float]]]


def measure(
    workers: Sequence[Worker], batches: Sequence[int], rounds: int, seconds: float
) -> Times:
    """Return the seconds of every call by worker and batch size, a list for each round.

    Args:
        workers: Processes that have loaded their files.
        batches: Batch sizes, one after the other.
        rounds: Turns of each worker at each batch size, after one to warm up.
        seconds: Of all turns together; a turn is one call or more.
    """
    from rounds import turns

    turn = seconds / (len(workers) * len(batches) * (rounds + 1))
    found: Times = defaultdict(list)
    for batch in batches:
        for worker in workers:
            worker.measure(batch, turn)
        for _, worker in turns(workers, rounds):
            found[worker, batch].append(worker.measure(batch, turn))
    return found


def describe(worker: Worker, workers: Sequence[Worker], times: Times) -> dict[str, Any]:
    """Return the figures of one file in one runtime, ready for JSON."""
    from rounds import compare, medians, summarise

    subject = worker.subject
    same = [w for w in workers if w.runtime == worker.runtime]
    reference = next((w for w in same if w.subject.name == subject.reference), None)
    batches = {}
    for (other, batch), calls in times.items():
        if other is worker:
            ratio = compare(times[reference, batch], calls) if reference else None
            batches[str(batch)] = {
                **asdict(summarise(calls, batch)),
                "round_medians_ms": [1e3 * m for m in medians(calls)],
                "times_as_fast": ratio and asdict(ratio),
            }
    return {
        "file": subject.name,
        "kind": subject.kind,
        "runtime": worker.runtime,
        "reference": subject.reference,
        "size_bytes": subject.size(worker.runtime),
        "load_seconds": worker.load_seconds,
        "peak_bytes": worker.peak_bytes(),
        "batches": batches,
    }


def run(options: argparse.Namespace) -> int:
    """Collect, measure, print, write; returns the exit status."""
    import machine
    import show
    from collection import collect
    from worker import Worker

    from qat.runtimes.table import find_runtime

    for name in options.runtime:
        find_runtime(name)
    if options.plot is not None:
        show.check_plot()
    threads = options.threads or machine.usable_cores()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        subjects = collect(options.artifacts, Path(folder), options.float, static=options.static)
        pairs = [(s, name) for name in options.runtime for s in subjects if s.runs_in(name)]
        workers = [stack.enter_context(closing(Worker(*pair, threads))) for pair in pairs]
        times = measure(workers, options.batch, options.rounds, options.seconds)
        result = {
            "machine": machine.describe(threads, options.runtime),
            "rounds": options.rounds,
            "seconds": options.seconds,
            "files": [describe(worker, workers, times) for worker in workers],
        }
    print(show.to_text(result))
    if options.json is not None:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
    if options.plot is not None:
        show.plot(result, options.plot)
    return 0


def positive(text: str) -> int:
    """Return ``text`` as a number of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def sizes(text: str) -> list[int]:
    """Return the batch sizes that ``text`` lists, each once."""
    return list(dict.fromkeys(positive(part) for part in text.split(",")))


def names(text: str) -> list[str]:
    """Return the names that ``text`` lists, each once."""
    return list(dict.fromkeys(text.split(",")))


def duration(text: str) -> float:
    """Return ``text`` as a number of seconds above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("artifacts", metavar="ARTIFACT", type=Path, nargs="+", help="an .onnx file or a run folder")
    add("--float", metavar="FILE.onnx", type=Path, help="the float file, instead of the runs' own")
    add("--static", action="store_true", help="also what onnxruntime quantizes without training")
    add(
        "--runtime", metavar="A,B", type=names, default=["onnxruntime"], help="default: onnxruntime"
    )
    add("--batch", metavar="N,N", type=sizes, default=[1, 32], help="batch sizes (default: 1,32)")
    add("--threads", metavar="N", type=positive, help="of each file (default: all cores)")
    add("--rounds", metavar="N", type=positive, default=10, help="turns of each (default: 10)")
    add("--seconds", metavar="S", type=duration, default=60.0, help="in all (default: 60)")
    add("--json", metavar="FILE", type=Path, help="also write all figures here")
    add("--plot", metavar="FILE.png", type=Path, help="also draw the median latencies")
    add("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    options = parse(argv)
    from qat.cli import guard

    return guard(lambda: run(options), show_traceback=options.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
