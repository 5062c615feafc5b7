"""Whether the files of a run predict what was trained, or the first place where they do not."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qat.files import write_text
from qat.stored_config import add_allow
from qat.terminal import show, terminal

EPILOG = """
ARTIFACT is the folder of a run or an export, or the model.onnx in it. Its model is restored from
the checkpoint: checkpoints/last.ckpt of a run, the one that an export was made from, or CHECKPOINT.
Fake-quant model, model of integers and file predict the whole test set. The chip without floats,
the simulation and the file without the runtime's optimisations predict about export.samples of it,
all with --all. Codes are compared site by site on a sample.

examples:
  python scripts/verify.py runs/resnet_w4a8/TIME
  python scripts/verify.py runs/resnet_w4a8/TIME data=arrays data.path=mine.npz --json proof.json
  python scripts/verify.py model.onnx --checkpoint last.ckpt --runtime openvino
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="a folder, or its .onnx")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="other data, as for train.py"
    )
    parser.add_argument("--checkpoint", metavar="CHECKPOINT", type=Path, help="what was exported")
    parser.add_argument(
        "--runtime", metavar="NAME", action="append", default=[], help="run the file there, too"
    )
    parser.add_argument("--all", action="store_true", help="run every form on all samples")
    add_allow(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result here")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_intermixed_args(argv)


def find_checkpoint(folder: Path) -> Path:
    """Return the checkpoint that the artifact in ``folder`` was made from.

    Raises:
        CheckpointError: If there is none.
    """
    from qat.errors import CheckpointError
    from qat.run import LAST

    stem = folder.name.removeprefix("export-")
    places = [folder / LAST, folder.parent / LAST.parent / f"{stem}.ckpt"]
    for place in places:
        if place.is_file():
            return place
    raise CheckpointError(
        f"expected a checkpoint for '{folder}', got none at '{places[0]}': name it with "
        "--checkpoint."
    )


def verify(arguments: argparse.Namespace) -> int:
    """Restore, convert, compare with the files, print, write; returns the exit status."""
    from qat.assemble import make_evaluation
    from qat.compose import compose_data
    from qat.errors import CheckpointError
    from qat.export.outcome import Outcome
    from qat.export.report import chip_line, model_table
    from qat.gate import verify as compare
    from qat.graph.convert import convert
    from qat.restore import finish, read_checkpoint, restore

    artifact: Path = arguments.artifact.absolute()
    folder = artifact.parent if artifact.suffix == ".onnx" else artifact
    path = arguments.checkpoint or find_checkpoint(folder)
    checkpoint = read_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"expected a training checkpoint of ours, got '{path}'.")
    changes = compose_data(arguments.overrides, checkpoint.config, path, arguments.allow)
    setup = restore(checkpoint, changes, arguments.allow)
    finish(setup.captured)
    evaluation = make_evaluation(setup.data, {**checkpoint.config, **changes})
    if arguments.all:
        evaluation = replace(evaluation, samples=None)
    model = convert(setup.captured)
    proof = compare(setup.captured, model, folder, evaluation, arguments.runtime)
    accuracy = {kind: found.accuracy for kind, found in proof.scores.items()}
    perplexity = {kind: found.perplexity for kind, found in proof.scores.items()}
    check = proof.verification
    if arguments.json is not None:
        result = {**check.to_dict(), "accuracy": accuracy, "perplexity": perplexity}
        write_text(arguments.json, json.dumps(result, indent=2) + "\n")
    differing = sum(site.share > 0 for site in check.sites)
    show(model_table(accuracy, perplexity, check))
    show(f"{len(check.sites)} sites, {differing} of which differ. {chip_line(check)}")
    check.check()
    check_files(folder)
    known = {kind: found.accuracy for kind, found in checkpoint.scores.items()}
    rate = None if checkpoint.rate is None else checkpoint.rate.first
    warnings = Outcome({**known, **accuracy}, proof.counts, rate).warnings()
    for warning in warnings:
        show(f"warning: {warning}")
    show("passed, with warnings" if warnings else "passed")
    return 0


def check_files(folder: Path) -> None:
    """Compare files with the checksums in the report beside them, and print which are others.

    Raises:
        VerificationError: If a model is another than the report was written for.
    """
    from qat.errors import VerificationError
    from qat.export.checksum import differing_files
    from qat.gate import ONNX, PACKED

    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        stored = report.get("sha256") if isinstance(report, dict) else None
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        show("no report.json with checksums: the files themselves are all that was checked")
        return
    others = differing_files(folder, stored)
    show(f"checksums of report.json: {len(stored) - len(others)} of {len(stored)} files as written")
    if changed := [name for name in others if name in (ONNX, PACKED)]:
        raise VerificationError(
            f"expected the files that '{folder / 'report.json'}' was written for, got another "
            f"{', '.join(changed)}: export again, or get the files again from where they came."
        )
    if others:
        show(f"changed since the run: {', '.join(others)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    arguments = parse(argv)
    from qat.cli import guard

    return guard(lambda: verify(arguments), show_traceback=arguments.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
