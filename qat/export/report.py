"""The report of a run: ``report.json``, whose keys are an interface, and ``report.md`` for people.

Stable keys: ``accuracy.float``, ``.post_training``, ``.fake_quant``, ``.converted``,
``.onnxruntime`` (percent); ``perplexity`` of the same;
``agreement.onnxruntime`` (share); ``size_bytes.float``, ``.onnx``, ``.safetensors``;
``seconds.<phase>``; ``passed``; ``warnings``. More keys may be added; these stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.export.outcome import Rate, ResultWarning
from qat.export.verify import Verification
from qat.files import write_text
from qat.integer_layers import IntegerLayer

MODEL_HEAD = (
    "model",
    "accuracy %",
    "from fake_quant (95 %)",
    "perplexity",
    "predictions",
    "agreement",
    "largest difference",
)
OUTPUT_HEAD = ("output", "model", "values that agree", "largest difference")
SITE_HEAD = ("site", "share that differs", "largest", "unoptimised: share", "largest")


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer: weight bits, weights, and the share of them that is zero."""

    layer: str
    bits: int
    weights: int
    sparsity: float


@dataclass
class Report:
    """Everything a run found out.

    Attributes:
        name: The run's name.
        accuracy: Percent on the whole evaluation set, by kind of model.
        verification: The comparison of files with the trained model; empty for a study.
        size_bytes: Bytes, by kind of file.
        layers: The quantized layers.
        seconds: Seconds, by phase.
        float_share: Share of the multiply-accumulates that stays float.
        perplexity: Exponential of the mean cross entropy there, by kind of model.
        details: More facts: scheme, seed, versions, samples.
        sha256: Checksum of each file of the run that is exchanged, by name.
        is_study: Nothing was exported, so nothing was compared.
        warnings: Why the result may be worth nothing, though the file is what was trained.
        rate: What the quantized model was trained with, if it was trained.
    """

    name: str
    accuracy: dict[str, float]
    verification: Verification
    size_bytes: dict[str, int]
    layers: list[LayerRow]
    seconds: dict[str, float]
    float_share: float
    perplexity: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    is_study: bool = False
    warnings: list[ResultWarning] = field(default_factory=list)
    rate: Rate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "name": self.name,
            **({"passed": None} if self.is_study else self.verification.to_dict()),
            "warnings": [warning._asdict() for warning in self.warnings],
            "learning_rate": None if self.rate is None else self.rate.to_dict(),
            "accuracy": self.accuracy,
            "perplexity": self.perplexity,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "float_share": self.float_share,
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "layers": [asdict(row) for row in self.layers],
            "details": self.details,
        }

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        check = self.verification
        return "\n\n".join(
            [
                f"# {self.name}: {self.verdict}",
                *(f"**Warning:** {warning}" for warning in self.warnings),
                f"{self._proof} Multiply-accumulates left in float: {self.float_share:.2%}.",
                model_table(self.accuracy, self.perplexity, check),
                "" if self.is_study else chip_line(check),
                _table(("file", "bytes"), [(k, f"{v:,}") for k, v in self.size_bytes.items()]),
                _table(("phase", "seconds"), [(k, f"{v:.1f}") for k, v in self.seconds.items()]),
                "## Layers",
                _table(
                    ("layer", "bits", "weights", "zeros", "largest sum"),
                    [self._layer(row) for row in self.layers],
                ),
                "## Sites (codes, file against converted model)",
                site_table(check),
                "The largest difference of an output is in 1/255 of the outputs' range.",
                *(["## Outputs (on the sample)", output_table(check)] if check.outputs else []),
                "## Details",
                _table(("key", "value"), list(self.details.items())),
                "",
            ]
        )

    @property
    def verdict(self) -> str:
        """What people read first: the file is the trained model or not, and what it is worth."""
        if not self.is_study and not self.verification.passed:
            return "FAILED"
        proof = "a study, nothing was exported" if self.is_study else "passed"
        return f"{proof}, with warnings" if self.warnings else proof

    @property
    def accuracies(self) -> str:
        """The accuracy of every kind of model in a line, and of how many predictions if few."""
        counts = self.verification.predictions
        whole, shown = max(counts.values(), default=0), list[str]()
        for kind, value in self.accuracy.items():
            count = counts.get(kind, whole)
            shown.append(f"{kind} {value:.2f} %" + (f" (of {count:,})" if count < whole else ""))
        return ", ".join(shown)

    @property
    def _proof(self) -> str:
        check = self.verification
        if self.is_study:
            return "target=simulation: accuracies of the trained model in float arithmetic."
        first = check.first_difference
        where = f"first differing site `{first.site}`" if first else "no site differs"
        return (
            f"Least agreement asked for: {check.threshold:.2%}; sample compared site by site: "
            f"{where}."
        )

    def _layer(self, row: LayerRow) -> tuple[object, ...]:
        largest = self.verification.largest_sums.get(row.layer)
        shown = "" if largest is None else f"{largest:,}"
        return (row.layer, row.bits, f"{row.weights:,}", f"{row.sparsity:.1%}", shown)

    def save(self, folder: Path) -> None:
        """Write ``report.md`` into ``folder``, and ``report.json``, the last file of a run."""
        write_text(folder / "report.md", self.to_markdown())
        write_text(folder / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")


def model_table(
    accuracy: Mapping[str, float], perplexity: Mapping[str, float], check: Verification
) -> str:
    """Return one row for every kind of model, as Markdown."""
    rows: list[tuple[object, ...]] = []
    for kind, value in accuracy.items():
        interval = check.accuracy_difference.get(kind)
        found = (
            (perplexity.get(kind), ".3f"),
            (check.predictions.get(kind), ","),
            (check.agreement.get(kind), ".4%"),
            (check.difference.get(kind), ".3g"),
        )
        apart = "" if interval is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*interval)
        shown = ("" if v is None else format(v, form) for v, form in found)
        rows.append((kind, f"{value:.2f}", apart, *shown))
    return _table(MODEL_HEAD, rows)


def site_table(check: Verification) -> str:
    """Return one row for every site: share of codes that differ and by how much, as Markdown."""
    plain = {s.site: s for s in check.sites_unoptimised}
    rows = []
    for s in check.sites:
        other = plain.get(s.site)
        beside = ("", "") if other is None else (f"{other.share:.2e}", other.largest)
        rows.append((s.site, f"{s.share:.2e}", s.largest, *beside))
    return _table(SITE_HEAD, rows)


def output_table(check: Verification) -> str:
    """Return one row for every output of every form of the model that was compared, as Markdown."""
    rows = [(x.output, x.kind, f"{x.agreement:.4%}", f"{x.largest:.3g}") for x in check.outputs]
    return _table(OUTPUT_HEAD, rows)


def chip_line(check: Verification) -> str:
    """Return what a chip without floats could not run, in one sentence."""
    counts = Counter(check.float_ops.values())
    if not counts:
        return "A chip without floats runs all of it."
    named = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"Without an integer form, so that a chip needs floats for them: {named}."


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def layer_rows(model: nn.Module) -> list[LayerRow]:
    """Return one row for every integer layer of a converted model."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            share = (module.weight == 0).double().mean().item()
            rows.append(LayerRow(name, module.spec.bits, module.weight_codes.numel(), share))
    return rows


def float_bytes(model: nn.Module) -> int:
    """Return the bytes that the original float model's parameters and buffers take."""
    tensors = [v for v in model.state_dict().values() if torch.is_tensor(v)]
    return sum(v.numel() * v.element_size() for v in tensors)
