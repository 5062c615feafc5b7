"""What a run is worth, beside the proof that its file is the trained model: warnings, and remedies.

A proof compares a file with what was trained; a model that was ruined in training is proved, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

FAR = 5.0
"""Percentage points below the float model that are far."""
NEAR = 0.05
"""Share of the way from guessing to perfect that is near guessing."""
MORE_ACCURACY = (
    "initialise=adaround; a lower optimizer.rates.qat_lr; distillation=logits; "
    "callbacks.calibrate.num_batches=32; more bits for all (scheme=w4a8, scheme=w8a8) or for the "
    "layers that lose most ('+scheme.rules.mine={match: ..., weight: {bits: 8}}')"
)


class ResultWarning(NamedTuple):
    """Why a result may be worth nothing: a word for programs, a sentence, and what to try."""

    kind: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}."


@dataclass(frozen=True)
class Rate:
    """The learning rate of the quantized part: the first one, and what a probe found, if one did.

    Attributes:
        first: Of the weights.
        tried: Loss in miniature by rate; empty where the rate was given.
        untrained: The same without a step.
    """

    first: float
    tried: Mapping[float, float] = field(default_factory=dict)
    untrained: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON; a loss that diverged is null."""
        finite = {f"{r:g}": v if math.isfinite(v) else None for r, v in self.tried.items()}
        return {"first": self.first, "tried": finite, "untrained": self.untrained}


@dataclass
class Counts:
    """How often each class is the label of an evaluation set, and how often it is predicted."""

    labels: Counter[int] = field(default_factory=Counter)
    predictions: Counter[int] = field(default_factory=Counter)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits ``(N, K)``, labels ``(N,)``."""
        self.labels.update(labels.tolist())
        self.predictions.update(logits.argmax(1).tolist())

    @property
    def guessing(self) -> float:
        """Percent that a model reaches which always answers the most frequent class."""
        return 100 * max(self.labels.values()) / self.labels.total()


@dataclass(frozen=True)
class Outcome:
    """The accuracies of a run, and what they are measured on.

    Attributes:
        accuracy: Percent, by kind of model.
        counts: Of the evaluation set, and of the trained model there.
        rate: First learning rate of the quantized part; ``None`` if nothing was trained there.
    """

    accuracy: Mapping[str, float]
    counts: Counts
    rate: float | None = None

    @property
    def final(self) -> float:
        """Percent of what is shipped: of the file, or of the trained model where there is none."""
        return self.accuracy.get("onnxruntime", self.accuracy["fake_quant"])

    def warnings(self) -> list[ResultWarning]:
        """Return what to know before the result is used; most runs have none."""
        if self.counts.labels.total() < 2:
            return []
        kinds = self._one_class, self._constant, self._near_chance, self._below_start, self._far
        return [warning for make in kinds if (warning := make()) is not None]

    def _one_class(self) -> ResultWarning | None:
        labels = self.counts.labels
        if len(labels) > 1:
            return None
        text = f"all {labels.total():,} labels of the evaluation set are class {next(iter(labels))}"
        return ResultWarning(
            "one_class", text, "accuracies there say nothing; add the other classes"
        )

    def _constant(self) -> ResultWarning | None:
        labels, found = self.counts.labels, self.counts.predictions
        if len(found) > 1 or len(labels) == 1:
            return None
        text = f"the model answers class {next(iter(found))} for all {found.total():,} samples"
        return ResultWarning("constant", text, f"do not use it; try {MORE_ACCURACY}")

    def _guesses(self, accuracy: float) -> bool:
        """Whether ``accuracy`` is hardly above that of a constant answer, or by chance."""
        guessing, size = self.counts.guessing, self.counts.labels.total()
        room = 100 - guessing
        noise = 2 * math.sqrt(guessing * room / size)
        return accuracy <= guessing + max(NEAR * room, min(noise, room / 5))

    def _near_chance(self) -> ResultWarning | None:
        if len(self.counts.labels) == 1 or not self._guesses(self.final):
            return None
        text = (
            f"{self.final:.2f} % is hardly better than guessing: the most frequent class alone is "
            f"{self.counts.guessing:.2f} %"
        )
        if self._guesses(self.accuracy.get("float", self.final)):
            remedy = (
                "the float model guesses, too: check that ckpt holds trained weights, the order of "
                "the classes, and data.mean and data.std"
            )
            return ResultWarning("near_chance", text, remedy)
        return ResultWarning("near_chance", text, f"do not use it; try {MORE_ACCURACY}")

    def _below_start(self) -> ResultWarning | None:
        start = self.accuracy.get("post_training")
        if self.rate is None or start is None or self.final >= start:
            return None
        text = (
            f"{self.final:.2f} % is below the {start:.2f} % that calibration alone gave: training "
            f"at optimizer.rates.qat_lr={self.rate:g} took accuracy away"
        )
        remedy = f"try optimizer.rates.qat_lr={self.rate / 10:g}, or schedule.epochs=0"
        return ResultWarning("below_post_training", text, f"{remedy}, with initialise=adaround")

    def _far(self) -> ResultWarning | None:
        start = self.accuracy.get("float")
        if start is None:
            return None
        far = max(1.0, min(FAR, (start - self.counts.guessing) / 5))
        if start - self.final <= far:
            return None
        text = f"{self.final:.2f} % is far below the float model's {start:.2f} %"
        return ResultWarning("far_below_float", text, f"try {MORE_ACCURACY}")
