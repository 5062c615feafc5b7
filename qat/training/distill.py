"""Knowledge distillation: a float model, as a rule its own, teaches a quantized one.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531; for
quantized students Esser et al., arXiv:1902.08153: temperature 1, both losses with the same weight.
Features: Romero et al., "FitNets", ICLR 2015, arXiv:1412.6550; differs: no layer in between, and
each sample's features are scaled to length 1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from qat.calls import Call
from qat.errors import ConfigError
from qat.graph.checkpointing import runs_again
from qat.training.evaluate import logits_of


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


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of samples whose features have length 1, shape ``()``.

    Args:
        student: Features ``(N, ...)``.
        teacher: Features of the same shape; no gradient.
    """
    ours, theirs = (
        F.normalize(features.float().flatten(1), dim=1) for features in (student, teacher.detach())
    )
    return (ours - theirs).square().sum(1).mean()


class Features:
    """What chosen modules of a model returned last.

    Args:
        model: The model.
        paths: Names of its modules.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._outputs: dict[str, Tensor] = {}
        self._handles = [
            model.get_submodule(path).register_forward_hook(self._keep(path)) for path in paths
        ]

    def _keep(self, path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            del module, args
            if not runs_again():
                self._outputs[path] = output

        return keep

    def take(self) -> list[Tensor]:
        """Return the outputs, in the order of the paths, and let go of them.

        Raises:
            ConfigError: If a module did not run.
        """
        missing = [path for path in self.paths if path not in self._outputs]
        if missing:
            raise ConfigError(
                f"expected modules that run by themselves in distillation.features, got {missing}: "
                "name layers, batch-norms or activations instead of blocks of them."
            )
        outputs = [self._outputs[path] for path in self.paths]
        self._outputs.clear()
        return outputs

    def remove(self) -> None:
        """Stop looking."""
        self._outputs.clear()
        for handle in self._handles:
            handle.remove()


class Remembered:
    """A model that runs once for each of some batches that come again and again.

    Args:
        model: Makes the same of a batch every time.
        most_bytes: Of all outputs that are kept; what comes behind them is computed each time.
    """

    def __init__(self, model: Callable[..., Any], most_bytes: int) -> None:
        self.signature = getattr(model, "signature", None)
        self._model, self._room = model, most_bytes
        self._known: list[tuple[list[Tensor], Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model makes of these tensors, known by being the same objects."""
        tensors = Call(args, kwargs).tensors
        for known, output in self._known:
            if len(known) == len(tensors) and all(map(operator.is_, known, tensors)):
                return output
        output = self._model(*args, **kwargs)
        size = sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if size <= self._room:
            self._room -= size
            self._known.append((tensors, output))
        return output


@dataclass(frozen=True)
class Teacher:
    """A frozen model, or what it once said, and how much it has to say.

    Attributes:
        model: Makes logits of a batch: a model in eval mode, no part of the student's module tree,
            or a ``TeacherCache``.
        weight: Share of the distillation loss, 0 to 1; the labels have the rest.
        temperature: Softens the classes of both.
        features: Of student and teacher, under the same paths, if they are compared.
        feature_weight: What their mean loss is multiplied by; it is added to the others.
    """

    model: Callable[[Tensor], Any]
    weight: float
    temperature: float
    features: tuple[Features, Features] | None = None
    feature_weight: float = 0.0

    def mix(self, loss: Tensor, student: Tensor, batch: Any) -> Tensor:
        """Return the loss of labels and teacher together, shape ``()``.

        Args:
            loss: The loss of the labels, shape ``()``.
            student: The student's logits ``(N, K)``.
            batch: Inputs ``(N, ...)``, or a tuple or mapping of arguments.
        """
        with torch.no_grad():
            logits = logits_of(self.model, batch)
        taught = distillation_loss(student, logits, self.temperature)
        mixed = (1 - self.weight) * loss + self.weight * taught
        if self.features is None:
            return mixed
        ours, theirs = (features.take() for features in self.features)
        losses = [feature_loss(a, b) for a, b in zip(ours, theirs, strict=True)]
        return mixed + self.feature_weight * torch.stack(losses).mean()

    def remembering(self, most_bytes: int) -> Teacher:
        """Return the same teacher for batches that come again; features need it to run each time.

        Args:
            most_bytes: Of all outputs that are kept.
        """
        if self.features is not None:
            return self
        return replace(self, model=Remembered(self.model, most_bytes))
