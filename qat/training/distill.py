"""Knowledge distillation: the float model teaches its quantized self.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531; for
quantized students Esser et al., arXiv:1902.08153: temperature 1, both losses with the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.training.evaluate import first_output


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence of the student's classes from the teacher's, shape ``()``.

    Its gradient for one row of ``student`` is ``temperature`` times the difference of the two
    softened distributions, divided by the number of rows.

    Args:
        student: Logits ``(N, K)``.
        teacher: Logits ``(N, K)``; no gradient.
        temperature: Divides both; the loss is multiplied by its square (Hinton et al., section 2).
    """
    ours, theirs = (
        F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher.detach())
    )
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True)
class Teacher:
    """A frozen model and how much it has to say.

    Attributes:
        model: In eval mode; no part of the student's module tree.
        weight: Share of the distillation loss, 0 to 1; the labels have the rest.
        temperature: Softens the classes of both.
    """

    model: nn.Module
    weight: float
    temperature: float

    def mix(self, loss: Tensor, student: Tensor, x: Tensor) -> Tensor:
        """Return the loss of labels and teacher together, shape ``()``.

        Args:
            loss: The loss of the labels, shape ``()``.
            student: The student's logits ``(N, K)``.
            x: The batch ``(N, ...)``.
        """
        with torch.no_grad():
            logits = first_output(self.model(x))
        taught = distillation_loss(student, logits, self.temperature)
        return (1 - self.weight) * loss + self.weight * taught
