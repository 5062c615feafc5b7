"""The classes of views: torch's own layers, holding parameters that are the model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class View(nn.Module):
    """Mixin of a module that shares what it holds with the model; only additions are its own."""

    shared: frozenset[str]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.shared:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k: self._own(k) for k in ("_parameters", "_buffers")}
        kept = {k: getattr(self, k) for k in own}
        report = (missing_keys, unexpected_keys, error_msgs)
        self.__dict__.update(own)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *report)
        finally:
            for table, values in own.items():
                kept[table].update(values)
            self.__dict__.update(kept)

    def _own(self, table: str) -> dict[str, Any]:
        return {k: v for k, v in getattr(self, table).items() if k not in self.shared}


class LinearView(View, nn.Linear):
    """``F.linear`` on a parameter of the model."""


class ProjectionView(View, nn.Linear):
    """``torch.addmm`` on a parameter of the model, whose weight ``(I, O)`` is transposed."""

    channel_axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight + bias``, shape ``(N, O)``."""
        return torch.addmm(self.bias, input, self.weight)


class Conv1dView(View, nn.Conv1d):
    """``F.conv1d`` on a parameter of the model."""


class Conv2dView(View, nn.Conv2d):
    """``F.conv2d`` on a parameter of the model."""


class Conv3dView(View, nn.Conv3d):
    """``F.conv3d`` on a parameter of the model."""


class ConvTranspose1dView(View, nn.ConvTranspose1d):
    """``F.conv_transpose1d`` on a parameter of the model."""


class ConvTranspose2dView(View, nn.ConvTranspose2d):
    """``F.conv_transpose2d`` on a parameter of the model."""


class ConvTranspose3dView(View, nn.ConvTranspose3d):
    """``F.conv_transpose3d`` on a parameter of the model."""


class EmbeddingView(View, nn.Embedding):
    """``F.embedding`` on a parameter of the model."""


class BatchNorm1dView(View, nn.BatchNorm1d):
    """``F.batch_norm`` on vectors or sequences."""


class BatchNorm2dView(View, nn.BatchNorm2d):
    """``F.batch_norm`` on images."""


class BatchNorm3dView(View, nn.BatchNorm3d):
    """``F.batch_norm`` on volumes."""
