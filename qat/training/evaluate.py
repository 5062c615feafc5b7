"""Accuracy of anything that maps a batch to logits, over a whole loader and all processes.

From the fold stage on a model is evaluated on integers: what is measured is what will run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.graph.captured import Captured
from qat.graph.integer import IntegerRun
from qat.training.phases import phase_of


def first_output(output: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
    """Return the logits of a model that may return several things, shape ``(N, K)``."""
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values())) if isinstance(output, dict) else output[0]


def inference(model: nn.Module) -> Callable[[Tensor], Any]:
    """Return what evaluates ``model``: the integer reference in its fold stage, else the model."""
    if isinstance(model, Captured) and phase_of(model) == "fold":
        return IntegerRun(model)
    return model


@torch.no_grad()
def predict(
    run: Callable[[Tensor], Any], loader: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return all logits ``(N, K)`` and labels ``(N,)`` of ``loader``, on the CPU.

    Args:
        run: Maps a batch ``(B, ...)`` to logits ``(B, K)``.
        loader: Batches of inputs and labels.
    """
    logits, labels = [], []
    for x, y in loader:
        logits.append(first_output(run(x)).float().cpu())
        labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the percentage of rows of ``logits`` ``(N, K)`` whose largest entry is the label."""
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy of ``model`` in eval mode over ``loader``, percent, over all processes.

    Args:
        model: The model; its mode comes back.
        loader: Batches of inputs and labels, sharded over the processes if there are several.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    run, counts = inference(model), torch.zeros(2, dtype=torch.long, device=device)
    for x, y in loader:
        hits = first_output(run(x.to(device))).argmax(1) == y.to(device)
        counts += torch.stack([hits.sum(), torch.tensor(len(y), device=device)])
    model.train(was_training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    return 100.0 * counts[0].item() / max(1, int(counts[1].item()))
