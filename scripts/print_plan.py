"""Print what a scheme makes of a model, without training: formats, cost, what stays float, lint.

Takes the overrides that train.py takes. With --input nothing is read from the data set; pretrained
weights are never loaded. An impossible plan, or a rule that matches nothing, ends in status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.files import write_text
from qat.terminal import show, terminal

if TYPE_CHECKING:
    from qat.data import DataModule
    from qat.graph.preview import Preview
    from qat.graph.targets import Target

CLASSES = 1000
EPILOG = """
examples:
  python scripts/print_plan.py recipe=resnet_w4a8
  python scripts/print_plan.py model=resnet18 scheme=w4a8 target=tensorrt --input 3,224,224
  python scripts/print_plan.py model=resnet20 scheme=w8a8 --diff w4a8
"""


def count(text: str) -> int:
    """Return a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def shape(text: str) -> tuple[int, ...]:
    """Return a shape written as ``3,224,224``."""
    return tuple(map(count, text.split(",")))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as for train.py")
    parser.add_argument(
        "--input", metavar="SHAPE", type=shape, help="shape of a sample, instead of the data's"
    )
    parser.add_argument(
        "--classes", metavar="N", type=count, help=f"with --input: classes (default {CLASSES})"
    )
    parser.add_argument(
        "--diff",
        metavar="OTHER",
        nargs="+",
        help="a second scheme, or overrides of a second plan: show only what differs",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write it to FILE, too")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.classes is not None and arguments.input is None:
        parser.error("--classes goes with --input; otherwise the data set says how many")
    return arguments


def changed(overrides: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return ``overrides`` with ``others`` in place of those of the same key."""
    others = [other if "=" in other else f"scheme={other}" for other in others]
    keys = {other.partition("=")[0].lstrip("+~") for other in others}
    kept = [o for o in overrides if o.partition("=")[0].lstrip("+~") not in keys]
    return [*kept, *others]


def plan(overrides: Sequence[str], arguments: argparse.Namespace) -> tuple[Preview, Target]:
    """Build the model of the overrides and plan it, on samples of the data or random values."""
    import torch

    from qat.assemble import make_model, make_scheme
    from qat.calls import Call
    from qat.compose import compose_parts
    from qat.graph.preview import preview
    from qat.graph.targets import find_target

    config = compose_parts(overrides, ("model", "scheme", "target"))
    target, scheme = find_target(config["target"]), make_scheme(config["scheme"])
    if arguments.input is None:
        data = set_up_data(overrides)
        sample, classes = data.input_shape, data.num_classes
        example = Call.of(data.calibration_batches(1)[0]).take(2)
    else:
        sample, classes = arguments.input, arguments.classes or CLASSES
        example = Call.of(torch.randn(2, *sample))
    node = config["model"]
    if "_target_" not in node:
        node = {key: value for key, value in node.items() if key != "weights"}
    model = make_model(node, classes, sample)
    return preview(model, scheme, example), target


def set_up_data(overrides: Sequence[str]) -> DataModule:
    """Return the data set of the overrides, read."""
    from qat.assemble import make
    from qat.compose import compose_parts

    config = compose_parts(overrides, ("data", "seed"))
    data = make(config["data"], seed=config["seed"])
    data.setup()
    return data


def describe(shown: Preview, target: Target) -> dict[str, Any]:
    """Return a preview as plain values, ready for JSON."""
    from dataclasses import asdict

    from qat.graph.lint import lint
    from qat.graph.preview import rows, totals

    return {
        "scheme": shown.plan.scheme,
        "target": target.name,
        "sites": [asdict(row) for row in rows(shown.plan)],
        "floats": [asdict(row) for row in shown.plan.floats],
        "totals": asdict(totals(shown.plan)),
        "unmatched": shown.unmatched,
        "findings": [asdict(finding) for finding in lint(shown.plan, target)],
    }


def print_plan(arguments: argparse.Namespace) -> int:
    """Plan, print and check; returns the exit status."""
    from qat.errors import GraphError
    from qat.graph.lint import check, lint
    from qat.graph.table import diff_table, preview_table

    shown, target = plan(arguments.overrides, arguments)
    content = describe(shown, target)
    if arguments.diff is None:
        show(preview_table(shown, lint(shown.plan, target), target.name))
    else:
        other, other_target = plan(changed(arguments.overrides, arguments.diff), arguments)
        names = shown.plan.scheme, " ".join(arguments.diff).removeprefix("scheme=")
        show(diff_table(shown.plan, other.plan, names))
        content = {"first": content, "second": describe(other, other_target)}
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(content, indent=2) + "\n")
    if arguments.diff is None:
        check(shown.plan, target)
        if shown.unmatched:
            raise GraphError(shown.unmatched[0])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    arguments = parse(argv)
    from qat.cli import guard

    return guard(lambda: print_plan(arguments), show_traceback=arguments.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
