"""An exported model and the classes that it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import ExportError
from qat.export.runtime import OnnxModel


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


def predict(
    model: OnnxModel, classes: Sequence[str], samples: Iterator[tuple[str, Tensor]], batch: int
) -> Iterator[Prediction]:
    """Yield the probabilities of all classes for every sample, sorted, batch after batch."""
    while chunk := list(islice(samples, batch)):
        logits = model(torch.stack([sample for _, sample in chunk]))
        order = logits.argsort(dim=1, descending=True, stable=True)
        values = logits.double().softmax(1).gather(1, order)
        for (name, _), best, shares in zip(chunk, order.tolist(), values.tolist(), strict=True):
            yield Prediction(name, [classes[int(i)] for i in best], shares)
