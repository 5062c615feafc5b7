"""An exported model and the classes that it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import ExportError
from qat.export.runtime import OnnxModel
from qat.predict.batches import Batch


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one input, best first, and their probabilities, 0 to 1."""

    file: str
    classes: list[str]
    probabilities: list[float]


def open_model(file: Path) -> tuple[OnnxModel, dict[str, Any]]:
    """Return the model of a file that we exported, and what is stored in it about its data.

    Raises:
        ExportError: If it is another kind of file.
    """
    model = OnnxModel(file)
    facts = model.metadata
    missing = sorted({"classes", "mean", "std"} - facts.keys())
    if missing:
        raise ExportError(
            f"expected a model exported by qat, got '{file}' without {', '.join(missing)} in its "
            "metadata: how its inputs are to be normalised is not known; export it with qat."
        )
    return model, facts


def predict(model: OnnxModel, classes: Sequence[str], batch: Batch, top: int) -> list[Prediction]:
    """Return the ``top`` likeliest classes of every sample in a batch."""
    if not batch.names:
        return []
    logits = model(batch.samples)
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
    shares = logits.double().softmax(1).gather(1, order)
    best = [[classes[int(i)] for i in row] for row in order.tolist()]
    return list(map(Prediction, batch.names, best, shares.tolist()))
