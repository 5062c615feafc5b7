"""The proof that an exported file predicts what training predicted, or the first place it does not.

Predictions are compared on the whole evaluation set; codes are compared site by site on a sample.
What computes in float is compared and reported too, but does not decide: its sums round in an order
of their own, and a code that lies close to a tie may turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.calls import on_batch
from qat.codecs import ActivationCodec
from qat.errors import VerificationError
from qat.export.agreement import Interval, OutputDifference
from qat.export.runtime import OnnxModel
from qat.export.sites import SUFFIX

DECISIVE = ("converted", "onnxruntime")
Observer = Callable[[ActivationCodec, Tensor], Tensor]
Compare = Callable[..., list["SiteDifference"]]


@dataclass(frozen=True)
class SiteDifference:
    """How the codes of one site differ between two runs: share of codes, and largest difference."""

    site: str
    share: float
    largest: int


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
        predictions: How many were compared, by name; fewer than all where a form runs on a sample.
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
    predictions: dict[str, int] = field(default_factory=dict)

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
            "predictions": self.predictions,
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
