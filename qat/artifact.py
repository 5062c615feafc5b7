"""From a trained model to its artifact: convert, export, verify, report."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

import qat
from qat.export.checksum import hash_file
from qat.export.onnx import export_onnx
from qat.export.outcome import Counts, Outcome, Rate
from qat.export.packed import save_packed
from qat.export.report import Report, layer_rows
from qat.export.verify import Verification
from qat.gate import ONNX, PACKED, Evaluation, verify
from qat.graph.captured import Captured
from qat.graph.convert import convert
from qat.graph.plan import Plan
from qat.training.evaluate import Score, evaluate

log = logging.getLogger("qat")
KEPT = (ONNX, PACKED, "plan.json")
"""Files whose checksums the report holds."""


@dataclass(frozen=True)
class Baseline:
    """What was found before the quantized model was trained.

    Attributes:
        scores: Of the models ``float`` and ``post_training``, those that were measured.
        size_bytes: Of the float model.
        rate: What the quantized model was trained with, if it was trained.
    """

    scores: Mapping[str, Score]
    size_bytes: int
    rate: Rate | None = None


def write_artifact(
    captured: Captured,
    plan: Plan,
    folder: Path,
    evaluation: Evaluation,
    baseline: Baseline,
    *,
    description: Mapping[str, Any],
    seconds: dict[str, float] | None = None,
) -> Report:
    """Convert, export and verify a model in its fold stage, and write files and report.

    Args:
        captured: The trained model.
        plan: Its plan.
        folder: Where the files go.
        evaluation: What to check it on.
        baseline: What was measured before.
        description: Facts for the files' metadata and the report: name, classes, normalisation.
        seconds: Seconds of earlier phases; the phases here are added.

    Raises:
        ExportError: If the model has no integer or ONNX form.
    """
    seconds = dict(seconds or {})
    captured = captured.cpu().eval()
    example = captured.signature.take(next(iter(evaluation.batches))[0], 1)
    with _timed(seconds, "convert"):
        model = convert(captured)
    with _timed(seconds, "export"):
        facts = {**description, "scheme": plan.scheme, "versions": versions()}
        storage = evaluation.storage
        export_onnx(model, example, folder / ONNX, metadata=facts, storage=storage)
        save_packed(model, example, folder / PACKED, metadata=facts)
    with _timed(seconds, "verify"):
        proof = verify(captured, model, folder, evaluation)
    files = {"onnx": folder / ONNX, "safetensors": folder / PACKED}
    scores = {**baseline.scores, **proof.scores}
    report = _report(scores, proof.counts, baseline, plan, facts, seconds)
    report.verification, report.layers = proof.verification, layer_rows(model)
    report.size_bytes |= {kind: path.stat().st_size for kind, path in files.items()}
    kept = [name for name in KEPT if (folder / name).is_file()]
    report.sha256 = {name: hash_file(folder / name) for name in kept}
    report.save(folder)
    return report


def write_study(
    captured: Captured,
    plan: Plan,
    folder: Path,
    evaluation: Evaluation,
    baseline: Baseline,
    *,
    description: Mapping[str, Any],
    seconds: dict[str, float] | None = None,
) -> Report:
    """Write a report of what a trained model predicts, and no files; arguments as above."""
    seconds = dict(seconds or {})
    counts = Counts()
    with _timed(seconds, "evaluate"):
        trained = evaluate(captured.cpu(), evaluation.batches, counts)
    scores = {**baseline.scores, "fake_quant": trained}
    facts = {**description, "scheme": plan.scheme, "versions": versions()}
    report = _report(scores, counts, baseline, plan, facts, seconds)
    report.is_study = True
    report.save(folder)
    return report


def _report(
    scores: Mapping[str, Score],
    counts: Counts,
    baseline: Baseline,
    plan: Plan,
    facts: Mapping[str, Any],
    seconds: dict[str, float],
) -> Report:
    accuracy = {kind: found.accuracy for kind, found in scores.items()}
    rate = baseline.rate
    return Report(
        name=str(facts["name"]),
        accuracy=accuracy,
        rate=rate,
        warnings=Outcome(accuracy, counts, None if rate is None else rate.first).warnings(),
        perplexity={kind: found.perplexity for kind, found in scores.items()},
        verification=Verification({}, {}),
        size_bytes={"float": baseline.size_bytes},
        layers=[],
        seconds=seconds,
        float_share=plan.float_share,
        details={
            **{k: v if isinstance(v, str | int) else json.dumps(v) for k, v in facts.items()},
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        },
    )


def versions() -> dict[str, str]:
    """Return the versions that decide what a file contains."""
    used = {"torch": torch, "onnx": onnx, "onnxruntime": onnxruntime}
    return {"qat": qat.__version__, **{name: m.__version__ for name, m in used.items()}}


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds of a block to a table, and say what is going on."""
    log.info("%s ...", phase)
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
