"""Write an artifact for ExecuTorch: model.pte beside model.safetensors, which is all it needs.

What XNNPACK has no form for is refused before anything is written, with the site and the reason;
layers that it computes in float are listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qat.terminal import show, terminal

EPILOG = """
examples:
  python scripts/lower.py runs/resnet_w8a8/TIME
  python scripts/lower.py model.safetensors --out phone.pte
  python scripts/verify.py runs/resnet_w8a8/TIME --runtime executorch
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT", type=Path, help="a folder, or its packed file"
    )
    parser.add_argument(
        "--out", metavar="FILE.pte", type=Path, help="default: beside the packed file"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_args(argv)


def lower(arguments: argparse.Namespace) -> int:
    """Load the packed file, lower it, write; returns the exit status."""
    from qat.errors import ExportError
    from qat.export.executorch import export_executorch
    from qat.gate import PACKED
    from qat.integer_layers import IntegerLayer
    from qat.runtimes.packed_model import PackedModel

    artifact: Path = arguments.artifact
    path = artifact / PACKED if artifact.is_dir() else artifact
    model, target = PackedModel(path), arguments.out or path.with_suffix(".pte")
    if model.signature is not None:
        raise ExportError(
            f"expected a model of one input and one output, got {model.signature.shown} in "
            f"'{path}': run it in another runtime."
        )
    layers = [m for m in model.modules() if isinstance(m, IntegerLayer)]
    found = export_executorch(model.graph_module, model.example(), target, metadata=model.metadata)
    show(f"{len(found)} of {len(layers)} layers compute on integers; wrote {target}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the libraries are only loaded once the arguments are right."""
    arguments = parse(argv)
    from qat.cli import guard

    return guard(lambda: lower(arguments), show_traceback=arguments.traceback)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
