"""The proof that an exported file predicts what training predicted, or the first place it does not.

Predictions are compared on the whole evaluation set; codes are compared site by site on a sample.
What computes in float is compared and reported too, but does not decide: its sums round in an order
of their own, and a code that lies close to a tie may turn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.calls import on_batch
from qat.codecs import ActivationCodec
from qat.errors import VerificationError
from qat.export.runtime import OnnxModel
from qat.export.sites import SUFFIX
from qat.outputs import named_tensors

DECISIVE = ("converted", "onnxruntime")
Z_95 = 1.959964
Observer = Callable[[ActivationCodec, Tensor], Tensor]
Compare = Callable[..., list["SiteDifference"]]


@dataclass(frozen=True)
class SiteDifference:
    """How the codes of one site differ between two runs: share of codes, and largest difference."""

    site: str
    share: float
    largest: int


@dataclass(frozen=True)
class OutputDifference:
    """How one output of a form of the model differs from the fold stage's, on a sample.

    Attributes:
        output: Its name.
        kind: The form of the model.
        agreement: Share of values within 1 % of the output's range; of integers, equal ones.
        largest: Largest difference, in 1/255 of the range.
    """

    output: str
    kind: str
    agreement: float
    largest: float


class Interval(NamedTuple):
    """A difference in percentage points, and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass
class Verification:
    """What was compared, and how it came out.

    Attributes:
        agreement: Share of equal predictions with the fake-quant model, by name, 0 to 1; those
            named in ``DECISIVE`` decide.
        difference: Largest difference of an output, in 1/255 of the outputs' range, by name.
        sites: Every site in the order of execution, of the file as its runtime optimises it.
        threshold: Least agreement that passes.
        accuracy_difference: Accuracy less that of the fake-quant model, by name.
        sites_unoptimised: The sites of the file as it is written.
        packed_difference: The first tensor in which the packed file differs; decides, too.
        float_ops: What has no integer form on a chip: name of the operation, by node.
        largest_sums: Largest magnitude of an accumulator, by layer.
        outputs: Every output of a model with several; those of forms in ``DECISIVE`` decide.
    """

    agreement: dict[str, float]
    difference: dict[str, float]
    sites: list[SiteDifference] = field(default_factory=list)
    threshold: float = 0.999
    accuracy_difference: dict[str, Interval] = field(default_factory=dict)
    sites_unoptimised: list[SiteDifference] = field(default_factory=list)
    packed_difference: str | None = None
    float_ops: dict[str, str] = field(default_factory=dict)
    largest_sums: dict[str, int] = field(default_factory=dict)
    outputs: list[OutputDifference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every decisive agreement reaches the threshold, and the packed file is right."""
        agree = all(share >= self.threshold for share in self._decisive.values())
        return agree and self.packed_difference is None and self.differing_output is None

    @property
    def differing_output(self) -> OutputDifference | None:
        """The decisive output that agrees least, if that is below the threshold."""
        decisive = [x for x in self.outputs if x.kind in DECISIVE]
        least = min(decisive, key=lambda x: x.agreement, default=None)
        return least if least is not None and least.agreement < self.threshold else None

    @property
    def _decisive(self) -> dict[str, float]:
        return {kind: share for kind, share in self.agreement.items() if kind in DECISIVE}

    @property
    def first_difference(self) -> SiteDifference | None:
        """The first site whose codes differ."""
        return next((s for s in self.sites if s.share > 0), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        first = self.first_difference
        return {
            "passed": self.passed,
            "agreement": self.agreement,
            "difference": self.difference,
            "accuracy_difference": {k: v._asdict() for k, v in self.accuracy_difference.items()},
            "first_difference": first.site if first else None,
            "packed_difference": self.packed_difference,
            "sites": [asdict(site) for site in self.sites],
            "sites_unoptimised": [asdict(site) for site in self.sites_unoptimised],
            "float_ops": self.float_ops,
            "largest_sums": self.largest_sums,
            "outputs": [asdict(output) for output in self.outputs],
        }

    def check(self) -> None:
        """Raise if an agreement is too low, or the packed file holds something else.

        Raises:
            VerificationError: Naming the first differing site or tensor.
        """
        if self.packed_difference is not None:
            raise VerificationError(
                f"expected model.safetensors to hold the converted model, got another value of "
                f"'{self.packed_difference}': export it again."
            )
        if self.passed:
            return
        name, share = min(self._decisive.items(), key=lambda item: item[1])
        first, output = self.first_difference, self.differing_output
        where = f"first at site '{first.site}'" if first else "in the output only"
        if share >= self.threshold and output is not None:
            raise VerificationError(
                f"expected output '{output.output}' of {output.kind} to agree with the fake-quant "
                f"model on at least {self.threshold:.2%} of its values, got "
                f"{output.agreement:.2%}: they differ {where}; see report.md, do not ship it."
            )
        raise VerificationError(
            f"expected {name} to agree with the fake-quant model on at least "
            f"{self.threshold:.2%} of the predictions, got {share:.2%}: they differ {where}; see "
            "report.md for every site, and do not ship this file."
        )


def paired_interval(reference: Tensor, other: Tensor) -> Interval:
    """Return how much more often ``other`` is right than ``reference``, in percentage points.

    Both judge the same samples, so only those count on which they differ; half a sample is added
    to each of the four cases, so that no difference seen is not taken for certainty.

    Args:
        reference: Whether each prediction is right, ``(N,)``.
        other: The same of the other model.

    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24 (2005), section 2 (the Wald interval plus 2).
    """
    gained = (other & ~reference).double().sum().item() + 0.5
    lost = (reference & ~other).double().sum().item() + 0.5
    count = len(reference) + 2
    middle = (gained - lost) / count
    spread = math.sqrt(max(gained + lost - count * middle**2, 0.0)) / count
    value = (gained - lost) / max(len(reference), 1)
    return Interval(*(100 * v for v in (value, middle - Z_95 * spread, middle + Z_95 * spread)))


def compare_outputs(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the share of equal predictions, and the largest difference in 1/255 of the range.

    Logits that are not finite predict nothing, so they never agree.

    Args:
        reference: Logits ``(N, K)``.
        other: Logits ``(N, K)``.
    """
    finite = (reference.isfinite() & other.isfinite()).all(1)
    agreement = ((reference.argmax(1) == other.argmax(1)) & finite).double().mean().item()
    step = (reference.max() - reference.min()).clamp_min(1e-12) / 255
    return agreement, ((reference - other).abs().max() / step).item()


def compare_trees(kind: str, reference: Any, other: Any) -> list[OutputDifference]:
    """Compare all tensors of what two forms of a model return.

    Args:
        kind: What the other form is called.
        reference: What the fold stage returns.
        other: What the other form returns, in dictionaries and tuples.
    """
    ours, theirs = named_tensors(reference), named_tensors(other)
    return [
        OutputDifference(name, kind, *compare_values(x, theirs.get(name)))
        for name, x in ours.items()
    ]


def compare_values(reference: Tensor, other: Tensor | None) -> tuple[float, float]:
    """Return the share of values that agree, and the largest difference in 1/255 of the range.

    Args:
        reference: An output, any shape and type; infinite and NaN agree with the same.
        other: The same of another form of the model, if it has it.
    """
    if other is None or other.shape != reference.shape:
        return 0.0, math.inf
    if reference.numel() == 0:
        return 1.0, 0.0
    a, b = reference.double(), other.double()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a[a.isfinite()]
    spread = float(finite.max() - finite.min()) if finite.numel() else 0.0
    gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
    near = gap <= (spread / 100 if reference.is_floating_point() else 0.0)
    return near.double().mean().item(), float(gap.max()) / max(spread, 1e-12) * 255


def compare_sites(
    make_run: Callable[[Observer], Callable[..., object]],
    path: Path,
    sites: list[str],
    batch: Any,
    *,
    optimise: bool = True,
    inspect: Callable[[str, Tensor, Tensor], None] | None = None,
) -> list[SiteDifference]:
    """Compare the codes that a converted model and its file make of a batch, site by site.

    Behind each site the converted model goes on with the file's codes, so that a difference is
    counted where it arises and nowhere else.

    Args:
        make_run: Makes a run of the converted model on integers that shows its codes.
        path: Its ``.onnx`` file.
        sites: What ``export_onnx`` returned.
        batch: A tensor ``(N, ...)``, or a tuple or mapping of arguments.
        optimise: Whether onnxruntime may rewrite the graph.
        inspect: Called with every site, the model's codes and the file's.
    """
    found = OnnxModel(path, optimise=optimise, outputs=[f"{s}{SUFFIX}" for s in sites]).run(batch)
    calls: Counter[str] = Counter()
    differences: list[SiteDifference] = []

    def compare(grid: ActivationCodec, codes: Tensor) -> Tensor:
        calls[grid.site] += 1
        repeat = calls[grid.site]
        site = grid.site if repeat == 1 else f"{grid.site}#{repeat}"
        theirs = torch.from_numpy(found[f"{site}{SUFFIX}"]).to(torch.float32)
        differences.append(_difference(site, codes, theirs))
        if inspect is not None:
            inspect(site, codes, theirs)
        return theirs

    on_batch(make_run(compare), batch)
    return differences


def _difference(site: str, a: Tensor, b: Tensor) -> SiteDifference:
    gap = (a.int() - b.int()).abs()
    return SiteDifference(site, (gap > 0).double().mean().item(), int(gap.max().item()))


def save_first_difference(file: Path, compare: Compare, site: str, reads: list[str]) -> None:
    """Write what a differing site reads and makes, so that it can be looked at by itself.

    Args:
        file: An ``.npz`` file to write: ``codes:model`` and ``codes:file`` are the stored codes
            that the two make there, ``reads:<site>`` those that are read.
        compare: ``compare_sites``, given all but ``inspect``.
        site: The site.
        reads: The sites that the operations in front of it read.
    """
    kept: dict[str, np.ndarray] = {}

    def inspect(name: str, ours: Tensor, theirs: Tensor) -> None:
        if name == site:
            kept.update({"codes:model": ours.int().numpy(), "codes:file": theirs.int().numpy()})
        elif name in reads:
            kept[f"reads:{name}"] = theirs.int().numpy()

    compare(inspect=inspect)
    np.savez_compressed(file, **kept)  # pyright: ignore[reportArgumentType]
