"""Export a training checkpoint of ours again, without training: files, verification and report.

A checkpoint from before the fold stage is frozen and folded first, which costs some accuracy that
training would have won back; one that is not quantized yet cannot be exported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qat.stored_config import add_allow
from qat.terminal import show, terminal

EPILOG = """
examples:
  python scripts/export.py runs/resnet_w4a8/TIME/checkpoints/last.ckpt
  python scripts/export.py last.ckpt --out exported data.root=/where/the/data/are/now
  python scripts/export.py last.ckpt --out small export.storage=size
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a .ckpt of a run")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="changes of data and export, such as data.root or export.storage",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="default: export-<checkpoint> in the run folder"
    )
    add_allow(parser)
    parser.add_argument("--force", action="store_true", help="overwrite a model in the folder")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_intermixed_args(argv)


def choose_folder(checkpoint: Path, out: Path | None, *, force: bool) -> Path:
    """Return where the files go.

    Raises:
        ExportError: If there is a model that would be overwritten.
    """
    from qat.errors import ExportError
    from qat.gate import ONNX

    parent = checkpoint.absolute().parent
    run_folder = parent.parent if parent.name == "checkpoints" else parent
    folder = run_folder / f"export-{checkpoint.stem}" if out is None else out
    if (folder / ONNX).exists() and not force:
        raise ExportError(
            f"expected a folder without a model, got '{folder}' with {ONNX}: choose another with "
            "--out, or overwrite it with --force."
        )
    return folder


def export(arguments: argparse.Namespace) -> int:
    """Restore, fold where needed, write and verify; returns the exit status."""
    from qat.artifact import Baseline, write_artifact
    from qat.assemble import describe, make_evaluation
    from qat.compose import compose_export
    from qat.errors import CheckpointError
    from qat.restore import finish, read_checkpoint, restore
    from qat.run import write_plan

    checkpoint = read_checkpoint(arguments.checkpoint)
    if checkpoint is None:
        raise CheckpointError(
            f"expected a training checkpoint of ours, got '{arguments.checkpoint}' without the "
            "config of a run: train from it first (train.py ckpt=... recipe=...)."
        )
    folder = choose_folder(arguments.checkpoint, arguments.out, force=arguments.force)
    allow = arguments.allow
    changes = compose_export(arguments.overrides, checkpoint.config, checkpoint.path, allow)
    config, setup = {**checkpoint.config, **changes}, restore(checkpoint, changes, allow)
    phase = finish(setup.captured)
    if phase != "fold":
        show(f"the checkpoint is in phase {phase}: froze its scales and folded its batch-norms")
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(setup.plan, config, folder)
    report = write_artifact(
        setup.captured,
        setup.plan,
        folder,
        make_evaluation(setup.data, config),
        Baseline(checkpoint.scores, setup.float_bytes, checkpoint.rate),
        description=describe(setup.data, config),
        seconds=checkpoint.seconds,
    )
    report.verification.check()
    show("accuracy: " + ", ".join(f"{kind} {v:.2f} %" for kind, v in report.accuracy.items()))
    for warning in report.warnings:
        show(f"warning: {warning}")
    show(f"{report.verdict}; artifact and report in {folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    arguments = parse(argv)
    from qat.cli import guard

    return guard(lambda: export(arguments), show_traceback=arguments.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
