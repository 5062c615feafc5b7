"""What works on which model: every torchvision classifier, and timm architectures of many families.

Weights are random, but for a last layer that is fitted to the samples, and inputs small where the
architecture allows it. Each model is captured, compared with the original in both modes, planned,
trained for one step, converted, exported and run in onnxruntime, as far as --until says. A failure
is one line, as the tool prints it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.files import write_text
from qat.terminal import terminal

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS = ("capture", "calibrate", "train", "convert", "export")
START, END = "<!-- zoo -->", "<!-- /zoo -->"
EPILOG = """
examples:
  python scripts/zoo.py --models resnet18,swin_t --until convert
  python scripts/zoo.py --models timm --json zoo.json
"""


@dataclass
class Row:
    """What was found out about one model; ``None`` where it did not come that far.

    Attributes:
        model: Its name; those of timm begin with ``timm/``.
        captured: Whether it could be captured and quantizers inserted.
        leaves: Modules that were left whole.
        eval_gap: Largest relative difference of an output in eval mode, quantizers off.
        train_gap: The same in training mode, from the same random state.
        keys_equal: Whether names and order of the checkpoint are the original's.
        quantized_share: Share of multiply-accumulates with integer weights and activations, as
            the plan has it.
        share_gap: Largest difference of that from what is counted in the integer reference, as it
            runs, and in the ONNX file.
        seconds: For capture, plan and insertion.
        calibration_error: Mean squared error of the outputs after calibration alone against the
            float model's, over their variance.
        noise_error: The same of the float model with noise as large as 8 bits round, at every
            activation: how far this network, whose weights are random, enlarges a difference.
        trained: Whether one quantized training step has a finite loss.
        converted: Whether conversion replays the fold stage, bit for bit.
        exported: Whether the file was written and runs.
        agreement: Share of equal predictions of onnxruntime and the fold stage.
        error: What stopped it, how predictions differ, or why calibration costs as much.
    """

    model: str
    captured: bool = False
    leaves: int | None = None
    eval_gap: float | None = None
    train_gap: float | None = None
    keys_equal: bool | None = None
    quantized_share: float | None = None
    share_gap: float | None = None
    seconds: float | None = None
    calibration_error: float | None = None
    noise_error: float | None = None
    trained: bool | None = None
    converted: bool | None = None
    exported: bool | None = None
    agreement: float | None = None
    error: str = ""


def examine(name: str, until: str, samples: int) -> Row:
    """Return what works on one model."""
    import torch
    from zoo_models import build, decide, pictures, wake

    from qat.errors import QatError

    row = Row(name)
    try:
        torch.manual_seed(0)
        result, size = build(name)
        x = pictures(samples, size)
        wake(result, x)
        decide(result, x)
        for step in STEPS[: STEPS.index(until) + 1]:
            result = TAKE[step](row, result, x)
    except (QatError, ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        add_reason(row, " ".join(str(error).split())[:300] or type(error).__name__)
    return row


def capture(row: Row, model: nn.Module, x: Tensor) -> nn.Module:
    """Capture, plan and insert; compare with the original in both modes."""
    from qat.assemble import make_scheme
    from qat.compose import compose_plain
    from qat.graph.equality import difference as gap, run_seeded
    from qat.graph.insert import prepare
    from qat.graph.trace import capture as capture_only

    config = compose_plain(["scheme=w8a8", "quantizer=uniform", "observer=min_max"])
    start = time.perf_counter()
    captured, plan = prepare(model, make_scheme(config["scheme"]), x[:2])
    row.seconds = time.perf_counter() - start
    row.captured, row.leaves = True, len(captured.leaves)
    row.quantized_share = 1 - plan.float_share
    row.keys_equal = list(capture_only(model, x[:2]).state_dict()) == list(model.state_dict())
    gaps = {}
    for mode in ("eval", "train"):
        pair = (deepcopy(model), deepcopy(captured))
        gaps[mode] = gap(*(run_seeded(m, captured, mode) for m in pair))
    row.eval_gap, row.train_gap = gaps["eval"], gaps["train"]
    return captured


def calibrate(row: Row, model: Any, x: Tensor) -> nn.Module:
    """Calibrate, and compare with the float model."""
    from zoo_errors import calibration_errors, reason

    errors = calibration_errors(model, x)
    row.calibration_error, row.noise_error = errors.calibrated, errors.noise
    row.error = reason(errors)
    return model


def add_reason(row: Row, text: str) -> None:
    """Add a reason to those that a row has."""
    row.error = "; ".join(filter(None, [row.error, text]))


def add_share(row: Row, total: int, in_float: int) -> None:
    """Compare what was counted with the plan."""
    from zoo_products import NEAR

    assert row.quantized_share is not None
    gap = abs(in_float / max(total, 1) - (1 - row.quantized_share))
    row.share_gap = max(gap, row.share_gap or 0.0)
    if gap > NEAR:
        add_reason(
            row,
            f"the plan has {1 - row.quantized_share:.2%} in float, "
            f"what runs {in_float / max(total, 1):.2%}",
        )


def train(row: Row, model: Any, x: Tensor) -> nn.Module:
    """Take one quantized training step."""
    import torch
    from torch.nn import functional as F
    from zoo_models import CLASSES

    from qat.training.evaluate import first_output

    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = F.cross_entropy(first_output(model.train()(x)), torch.arange(len(x)) % CLASSES)
    loss.backward()
    optimizer.step()
    row.trained = bool(loss.isfinite())
    return model.eval()


def convert(row: Row, model: Any, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Fold and convert; both run on integers and have to agree in every bit."""
    import torch
    from zoo_products import CountedRun

    from qat.graph.convert import convert as to_integers
    from qat.layers import fold
    from qat.reference.run import IntegerRun
    from qat.training.evaluate import first_output

    fold(model)
    add_share(row, *CountedRun(model).count(x[:2]))
    converted = to_integers(model)
    expected = first_output(IntegerRun(model)(x))
    row.converted = torch.equal(expected, first_output(IntegerRun(converted)(x)))
    return converted, expected


def export(row: Row, made: Any, x: Tensor) -> None:
    """Export and compare the predictions of the file."""
    from zoo_products import count_file

    from qat.export.agreement import compare_outputs
    from qat.export.onnx import export_onnx
    from qat.export.runtime import OnnxModel
    from qat.training.evaluate import first_output

    model, expected = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, x[:1], path)
        row.exported = True
        found = first_output(OnnxModel(path)(x))
        add_share(row, *count_file(path, {"input": x[:2].numpy()}))
    row.agreement = compare_outputs(expected, found)[0]
    if row.agreement < 1:
        add_reason(row, difference(expected, found))


def difference(expected: Tensor, found: Tensor) -> str:
    """Return by how much predictions differ, in one line; both are logits ``(N, K)``."""
    differing = expected.argmax(1) != found.argmax(1)
    best = expected.topk(2, 1).values[differing]
    margin = (best[:, 0] - best[:, 1]).max().item()
    gap, spread = (expected - found).abs().max().item(), expected.std().item()
    return (
        f"{int(differing.sum())} of {len(expected)} predictions differ, where the two best classes "
        f"are at most {margin:.2g} apart; outputs differ by up to {gap:.2g}, their spread is "
        f"{spread:.2g}"
    )


TAKE: dict[str, Callable[[Row, Any, Any], Any]] = {
    "capture": capture,
    "calibrate": calibrate,
    "train": train,
    "convert": convert,
    "export": export,
}


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table, and what they come to in all."""
    head = [name for name in Row.__dataclass_fields__ if name != "error"] + ["error"]
    lines = [head, ["---"] * len(head)]
    lines += [[cell(value) for value in asdict(row).values()] for row in rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    counts = [f"{len(rows)} models", f"{sum(r.captured for r in rows)} captured"]
    for kind in ("trained", "converted", "exported"):
        tried = [r for r in rows if getattr(r, kind) is not None]
        counts += [f"{sum(getattr(r, kind) for r in tried)} {kind}"] if tried else []
    agreeing = [r.agreement >= 0.99 for r in rows if r.agreement is not None]
    counts += [f"{sum(agreeing)} agree on 99 % of the predictions"] if agreeing else []
    return f"{', '.join(counts)}.\n\n{table}"


def cell(value: Any) -> str:
    """Return one cell of the table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_page(path: Path, text: str) -> None:
    """Put ``text`` between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    write_text(path, f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}")


def run(options: argparse.Namespace) -> int:
    """Examine, print, write; returns the exit status."""
    from zoo_models import names

    warnings.filterwarnings("ignore")
    rows = []
    for name in names(options.models):
        rows.append(examine(name, options.until, options.samples))
        print(json.dumps(asdict(rows[-1])), flush=True)
        if options.json is not None:
            write_text(options.json, json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    if options.into is not None:
        write_page(options.into, to_markdown(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="all", help="all, torchvision, timm, or a,b,c")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step to take")
    parser.add_argument("--samples", type=int, default=16, help="samples of the batch")
    parser.add_argument("--json", type=Path, help="a file for one object a model")
    parser.add_argument("--into", type=Path, help=f"a page with {START} and {END}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    options = parser.parse_args(argv)
    from qat.cli import guard

    return guard(lambda: run(options), show_traceback=options.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
