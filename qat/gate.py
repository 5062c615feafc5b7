"""The gate at the end of a run: every form of a model on the whole evaluation set, and its files.

The fold stage is the reference. Beside it run the model of integers, the chip without floats, the
exported file with the runtime's optimisations on and off, and the simulation that trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from qat.graph.captured import Captured
from qat.held import hold
from qat.outputs import ONE_OUTPUT, named_tensors
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from qat.runtimes.table import load_runtime
from qat.signature import interface
from qat.training.evaluate import Score, predict, score

ONNX, PACKED = "model.onnx", "model.safetensors"
DIFFERENCE = "first_difference.npz"


@dataclass(frozen=True)
class Evaluation:
    """How an artifact is stored, and what it is checked on.

    Attributes:
        batches: The evaluation set: inputs, ``(B, ...)`` or tuples or mappings of arguments, and
            labels ``(B,)``, or ``(B, T)`` of sequences; read several times.
        threshold: Least share of equal predictions that passes.
        site_samples: Samples whose codes are compared site by site.
        storage: What the ONNX file is for: ``"speed"`` or ``"size"``.
    """

    batches: Iterable[tuple[Any, Tensor]]
    threshold: float = 0.999
    site_samples: int = 64
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
    runs: dict[str, Callable[..., Any]] = {
        "fake_quant": IntegerRun(captured),
        "converted": IntegerRun(model),
        "onnxruntime": OnnxModel(path),
        "chip": chip,
        "simulated": captured,
        "onnxruntime_unoptimised": OnnxModel(path, optimise=False),
        **{name: load_runtime(name, path) for name in runtimes},
    }
    with hold(captured):
        logits = {kind: predict(run, evaluation.batches) for kind, run in runs.items()}
    check = _compare(logits, evaluation.threshold)
    sample = captured.signature.take(next(iter(evaluation.batches))[0], evaluation.site_samples)
    compare = partial(compare_sites, partial(IntegerRun, model), path, sites, sample)
    check.sites, check.sites_unoptimised = compare(), compare(optimise=False)
    check.packed_difference = _packed_difference(model, folder / PACKED, sample)
    if len(captured.outputs["eval"].tensors) > 1:
        reference = sample.on(runs["fake_quant"])
        for kind in DECISIVE:
            check.outputs += compare_trees(kind, reference, sample.on(runs[kind]))
    check.float_ops, check.largest_sums = dict(chip.float_ops), dict(chip.largest)
    first = check.first_difference
    if first is not None:
        save_first_difference(folder / DIFFERENCE, compare, first.site, sources(model, first.site))
    counts = Counts()
    counts.add(*logits["fake_quant"])
    return Proof({kind: score(*found) for kind, found in logits.items()}, check, counts)


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


def _compare(found: dict[str, tuple[Tensor, Tensor]], threshold: float) -> Verification:
    reference, labels = found["fake_quant"]
    others = {kind: logits for kind, (logits, _) in found.items() if kind != "fake_quant"}
    pairs = {kind: compare_outputs(reference, logits) for kind, logits in others.items()}
    return Verification(
        agreement={kind: pair[0] for kind, pair in pairs.items()},
        difference={kind: pair[1] for kind, pair in pairs.items()},
        accuracy_difference={
            kind: paired_interval(reference.argmax(1) == labels, logits.argmax(1) == labels)
            for kind, logits in others.items()
        },
        threshold=threshold,
    )
