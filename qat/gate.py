"""The gate at the end of a run: every form of a model on the whole evaluation set, and its files.

The fold stage is the reference. Beside it run the model of integers and the exported file; and on a
part of the set the chip without floats, the simulation that trained, and the file as it is written,
without the runtime's optimisations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qat.calls import Call
from qat.export.agreement import compare_outputs, compare_trees, paired_interval
from qat.export.outcome import Counts
from qat.export.packed import first_packed_difference, holds_graph
from qat.export.runtime import OnnxModel
from qat.export.sites import check_sites, sources
from qat.export.storage import Storage
from qat.export.verify import DECISIVE, Verification, compare_sites, save_first_difference
from qat.fake_quant import fake_quants
from qat.forms import Predicted, predict_all
from qat.graph.captured import Captured
from qat.held import hold
from qat.outputs import ONE_OUTPUT, named_tensors
from qat.quantizers import DynamicTensor
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from qat.runtimes.table import load_runtime
from qat.signature import interface
from qat.training.evaluate import Score, score

ONNX, PACKED = "model.onnx", "model.safetensors"
DIFFERENCE = "first_difference.npz"
PIECE = 2**20
"""Bytes of input that run at once."""
SAMPLED = ("chip", "simulated", "onnxruntime_unoptimised")
"""Forms that run on a part of the evaluation set."""


@dataclass(frozen=True)
class Evaluation:
    """How an artifact is stored, and what it is checked on.

    Attributes:
        batches: The evaluation set: inputs, ``(B, ...)`` or tuples or mappings of arguments, and
            labels ``(B,)``, or ``(B, T)`` of sequences; read several times.
        threshold: Least share of equal predictions that passes.
        site_samples: Samples whose codes are compared site by site.
        samples: Samples, spread over the set, on which the forms of ``SAMPLED`` run, which do not
            decide; None for all.
        storage: What the ONNX file is for: ``"speed"`` or ``"size"``.
    """

    batches: Iterable[tuple[Any, Tensor]]
    threshold: float = 0.999
    site_samples: int = 64
    samples: int | None = 1000
    storage: Storage = "speed"


@dataclass(frozen=True)
class Proof:
    """How well every form of a model predicts, how far they agree, and which classes occur."""

    scores: dict[str, Score]
    verification: Verification
    counts: Counts


def verify(
    captured: Captured,
    model: fx.GraphModule,
    folder: Path,
    evaluation: Evaluation,
    runtimes: Sequence[str] = (),
) -> Proof:
    """Compare a model in its fold stage with its files, prediction by prediction and site by site.

    Where codes differ, what the first such site reads and makes is written into ``folder``.

    Args:
        captured: The trained model.
        model: What ``qat.graph.convert`` made of it.
        folder: Holds ``model.onnx`` and ``model.safetensors``.
        evaluation: What to compare on.
        runtimes: Others that run the file too, by name; they do not decide.

    Raises:
        ConfigError: If there is no runtime of that name.
        ExportError: If a file is damaged, or another model's.
    """
    path = folder / ONNX
    sites, chip = check_sites(path, model), ChipRun(model)
    reference = IntegerRun(captured)
    runs: dict[str, Callable[..., Any]] = {
        "fake_quant": reference,
        "converted": IntegerRun(model, like=reference),
        "onnxruntime": OnnxModel(path, spinning=False),  # forms run in turns
        "chip": chip,
        "simulated": captured,
        "onnxruntime_unoptimised": OnnxModel(path, optimise=False, spinning=False),
        **{name: load_runtime(name, path) for name in runtimes},
    }
    with hold(captured):
        found = predict_all(
            runs,
            captured.signature,
            evaluation.batches,
            SAMPLED,
            evaluation.samples,
            _piece(captured),
        )
    check = _compare(found, evaluation.threshold)
    sample = captured.signature.take(next(iter(evaluation.batches))[0], evaluation.site_samples)
    compare = partial(compare_sites, partial(IntegerRun, model), path, sites, sample)
    check.sites, check.sites_unoptimised = compare(), compare(optimise=False)
    check.packed_difference = _packed_difference(model, folder / PACKED, sample)
    if len(captured.outputs["eval"].tensors) > 1:
        expected = sample.on(reference)
        for kind in DECISIVE:
            check.outputs += compare_trees(kind, expected, sample.on(runs[kind]))
    check.float_ops = dict(chip.float_ops)
    check.largest_sums = _largest(chip, runs["converted"])
    first = check.first_difference
    if first is not None:
        save_first_difference(folder / DIFFERENCE, compare, first.site, sources(model, first.site))
    counts = Counts()
    counts.add(found["fake_quant"].logits, found["fake_quant"].labels)
    scores = {kind: score(form.logits, form.labels) for kind, form in found.items()}
    return Proof(scores, check, counts)


def _piece(captured: Captured) -> int | None:
    """Return the bytes of input that run at once, None where every batch brings its scales."""
    dynamic = any(isinstance(f.quantizer, DynamicTensor) for f in fake_quants(captured))
    has_batch = any(x.has_batch for x in captured.signature.inputs)
    return None if dynamic or not has_batch else PIECE


def _largest(*runs: Any) -> dict[str, int]:
    """Return the largest sums that any of some runs reached, by layer."""
    layers = {layer for run in runs for layer in run.largest}
    return {layer: max(run.largest.get(layer, 0) for run in runs) for layer in layers}


def _packed_difference(model: fx.GraphModule, path: Path, sample: Call) -> str | None:
    """Return the first tensor in which a packed file differs, or what it predicts from a sample.

    The only output, or the chosen one, is called ``predictions``; others have their names.
    """
    different = first_packed_difference(model, path)
    if different is not None or not holds_graph(path):
        return different
    signature = interface(model)[0]
    chosen = None if signature is None else signature.prediction
    theirs = named_tensors(sample.on(PackedModel(path)))
    for name, ours in named_tensors(sample.on(IntegerRun(model))).items():
        if name not in theirs or not torch.equal(ours, theirs[name]):
            return "predictions" if name in (chosen, ONE_OUTPUT) else name
    return None


def _compare(found: Mapping[str, Predicted], threshold: float) -> Verification:
    check = Verification({}, {}, threshold=threshold)
    reference = found["fake_quant"]
    for kind, form in found.items():
        check.predictions[kind] = len(form.labels)
        if form is reference:
            continue
        expected = reference.logits[form.rows]
        check.agreement[kind], check.difference[kind] = compare_outputs(expected, form.logits)
        right = (x.argmax(1) == form.labels for x in (expected, form.logits))
        check.accuracy_difference[kind] = paired_interval(*right)
    return check
