"""Accuracy and perplexity of anything that maps a batch to logits, over a loader and all processes.

From the fold stage on a model is evaluated on integers: what is measured is what will run. Logits
of a sequence, ``(N, T, K)`` with labels ``(N, T)``, count as ``N * T`` predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from qat.calls import on_batch, on_device
from qat.export.outcome import Counts
from qat.graph.captured import Captured
from qat.held import hold
from qat.outputs import find_prediction
from qat.reference.run import IntegerRun
from qat.training.phases import phase_of

Batches = Iterable[tuple[Any, Tensor]]


class Score(NamedTuple):
    """How well a model predicts.

    Attributes:
        accuracy: Percent of the predictions that are the label.
        perplexity: Exponential of the mean cross entropy: 1 is perfect, K is guessing.
    """

    accuracy: float
    perplexity: float


def first_output(output: Any, prediction: str | None = None) -> Tensor:
    """Return the logits of a model that may return several things, one row a prediction.

    Args:
        output: Logits ``(N, K)`` or ``(N, T, K)``, or a tree that holds them.
        prediction: Their name; None means ``logits``, else the first tensor.

    Returns:
        Logits ``(N, K)`` or ``(N * T, K)``; the labels that fit are ``y.flatten()``.

    Raises:
        GraphError: If there is no output of that name.
    """
    return find_prediction(output, prediction).flatten(0, -2)


def logits_of(run: Callable[..., Any], batch: Any, model: Any = None) -> Tensor:
    """Return the logits that ``run`` makes of a batch, one row a prediction.

    Args:
        run: A model, or anything that is called like one.
        batch: A tensor ``(N, ...)``, or a tuple or mapping of arguments.
        model: Knows which output is the prediction; ``run`` itself if there is none.
    """
    signature = getattr(run if model is None else model, "signature", None)
    return first_output(on_batch(run, batch), getattr(signature, "prediction", None))


def inference(model: nn.Module) -> Callable[..., Any]:
    """Return what evaluates ``model``: the integer reference in its fold stage, else the model."""
    if isinstance(model, Captured) and phase_of(model) == "fold":
        return IntegerRun(model)
    return model


@torch.no_grad()
def predict(run: Callable[..., Any], loader: Batches) -> tuple[Tensor, Tensor]:
    """Return all logits ``(N, K)`` and labels ``(N,)`` of ``loader``, on the CPU.

    Args:
        run: Maps a batch to logits ``(B, K)`` or ``(B, T, K)``, or a tree that holds them.
        loader: Batches of inputs and labels.
    """
    logits, labels = [], []
    for x, y in loader:
        logits.append(logits_of(run, x).float().cpu())
        labels.append(y.flatten().cpu())
    return torch.cat(logits), torch.cat(labels)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return correct predictions, sum of cross entropies and predictions, float64 ``(3,)``."""
    hits = (logits.argmax(1) == labels).sum()
    losses = F.cross_entropy(logits.float(), labels, reduction="none").double().sum()
    return torch.stack([hits.double(), losses, torch.tensor(len(labels)).to(losses)])


def _score(sums: Tensor) -> Score:
    hits, losses, count = sums.cpu()
    count = count.clamp_min(1)
    return Score(100.0 * (hits / count).item(), (losses / count).exp().item())


def score(logits: Tensor, labels: Tensor) -> Score:
    """Return accuracy and perplexity of logits ``(N, K)`` for labels ``(N,)``."""
    return _score(_sums(logits, labels))


@torch.no_grad()
def evaluate(model: nn.Module, loader: Batches, counts: Counts | None = None) -> Score:
    """Return accuracy and perplexity of ``model`` in eval mode, over all processes.

    Args:
        model: The model; its mode comes back.
        loader: Batches of inputs and labels, sharded over the processes if there are several.
        counts: Counts labels and predictions, of this process, if it is given.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    run, sums = inference(model), torch.zeros(3, dtype=torch.float64, device=device)
    with hold(model):
        for x, y in loader:
            logits = logits_of(run, on_device(x, device))
            sums += _sums(logits, y.to(device).flatten())
            if counts is not None:
                counts.add(logits, y.flatten())
    model.train(was_training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return _score(sums)
