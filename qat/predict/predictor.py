"""An exported model and the classes that it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import ExportError
from qat.export.runtime import OnnxModel
from qat.outputs import find_prediction
from qat.predict.batches import Batch
from qat.predict.facts import check_facts, check_model

NOT_FINITE = "expected finite logits of the model, got NaN or infinity"


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one input, best first, and their probabilities, 0 to 1."""

    file: str
    classes: list[str]
    probabilities: list[float]


def open_model(file: Path) -> tuple[OnnxModel, dict[str, Any]]:
    """Return the model of a file that we exported, and what is stored in it about its data.

    Raises:
        ExportError: If it is another kind of file, or says about its data what cannot be.
    """
    model = OnnxModel(file)
    facts = model.metadata
    missing = sorted({"classes", "mean", "std"} - facts.keys())
    if missing:
        raise ExportError(
            f"expected a model exported by qat, got '{file}' without {', '.join(missing)} in its "
            "metadata: how its inputs are to be normalised is not known; export it with qat."
        )
    check_model(model, file)
    check_facts(facts, model, file)
    return model, {**facts, "classes": [_writable(name) for name in facts["classes"]]}


def _writable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def predict(
    model: OnnxModel, classes: Sequence[str], batch: Batch, top: int
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """Return the ``top`` likeliest classes of every sample in a batch, and what has none.

    Raises:
        ExportError: If the model cannot be run, or returns something else than one value a class.
    """
    if not batch.names:
        return [], batch.left_out
    logits = _run(model, batch.samples, len(classes))
    order = logits.argsort(dim=1, descending=True, stable=True)[:, : min(top, len(classes))]
    shares = logits.double().softmax(1).gather(1, order)
    best = [[classes[int(i)] for i in row] for row in order.tolist()]
    found = list(map(Prediction, batch.names, best, shares.tolist()))
    usable = logits.isfinite().all(1).tolist()
    lost = [(p.file, NOT_FINITE) for p, fine in zip(found, usable, strict=True) if not fine]
    return [p for p, fine in zip(found, usable, strict=True) if fine], [*batch.left_out, *lost]


def _run(model: OnnxModel, samples: Tensor, classes: int) -> Tensor:
    try:
        prediction = model.signature.prediction if model.signature else None
        logits = find_prediction(model(samples), prediction)
    except Exception as error:  # onnxruntime's have no common type
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"expected a model that runs on batches of shape {tuple(samples.shape)}, got "
            f"{reason}: lower --batch, or export it again."
        ) from error
    if logits.shape != (len(samples), classes) or not logits.is_floating_point():
        raise ExportError(
            f"expected logits of shape ({len(samples)}, {classes}), one for each class in the "
            f"model's metadata, got {logits.dtype} {tuple(logits.shape)}: export it again."
        )
    return logits
