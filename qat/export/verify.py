"""The proof that an exported file predicts what training predicted, or the first place it does not.

Predictions are compared on the whole evaluation set; codes are compared site by site on a sample.
What computes in float is compared and reported too, but does not decide: its sums round in an order
of their own, and a code that lies close to a tie may turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qat.errors import VerificationError
from qat.export.runtime import OnnxModel
from qat.integer_layers import ActivationCodec

DECISIVE = ("converted", "onnxruntime")
Observer = Callable[[ActivationCodec, Tensor], Tensor]


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
        sites: Every site in the order of execution.
        threshold: Least agreement that passes.
    """

    agreement: dict[str, float]
    difference: dict[str, float]
    sites: list[SiteDifference] = field(default_factory=list)
    threshold: float = 0.999

    @property
    def passed(self) -> bool:
        """Whether every decisive agreement reaches the threshold."""
        return all(share >= self.threshold for share in self._decisive.values())

    @property
    def _decisive(self) -> dict[str, float]:
        return {kind: share for kind, share in self.agreement.items() if kind in DECISIVE}

    @property
    def first_difference(self) -> SiteDifference | None:
        """The first site whose codes differ."""
        return next((s for s in self.sites if s.share > 0), None)

    def check(self) -> None:
        """Raise if an agreement is too low.

        Raises:
            VerificationError: Naming the first differing site.
        """
        if self.passed:
            return
        name, share = min(self._decisive.items(), key=lambda item: item[1])
        first = self.first_difference
        where = f"first at site '{first.site}'" if first else "in the output only"
        raise VerificationError(
            f"expected {name} to agree with the fake-quant model on at least "
            f"{self.threshold:.2%} of the predictions, got {share:.2%}: they differ {where}; see "
            "report.md for every site, and do not ship this file."
        )


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


def compare_sites(
    make_run: Callable[[Observer], Callable[[Tensor], object]],
    path: Path,
    sites: list[str],
    x: Tensor,
    *,
    optimise: bool = True,
) -> list[SiteDifference]:
    """Compare the codes that a converted model and its file make of ``x``, site by site.

    Behind each site the converted model goes on with the file's codes, so that a difference is
    counted where it arises and nowhere else.

    Args:
        make_run: Makes a run of the converted model on integers that shows its codes.
        path: Its ``.onnx`` file.
        sites: What ``export_onnx`` returned.
        x: One batch ``(N, ...)``, real values.
        optimise: Whether onnxruntime may rewrite the graph.
    """
    found = OnnxModel(path, optimise=optimise, outputs=[f"{s}:codes" for s in sites]).run(x)
    calls: Counter[str] = Counter()
    differences: list[SiteDifference] = []

    def compare(grid: ActivationCodec, codes: Tensor) -> Tensor:
        calls[grid.site] += 1
        repeat = calls[grid.site]
        site = grid.site if repeat == 1 else f"{grid.site}#{repeat}"
        theirs = torch.from_numpy(found[f"{site}:codes"]).to(torch.float32)
        differences.append(_difference(site, codes, theirs))
        return theirs

    make_run(compare)(x)
    return differences


def _difference(site: str, a: Tensor, b: Tensor) -> SiteDifference:
    gap = (a.int() - b.int()).abs()
    return SiteDifference(site, (gap > 0).double().mean().item(), int(gap.max().item()))
