"""Attention taken apart, so that its matrix products can be quantized.

The parts compute what the fused operations compute, up to the rounding of float sums; scores are
scaled behind their product, where nothing has to be rounded once more for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return ``F.scaled_dot_product_attention`` of the same arguments.

    Args:
        query: Shape ``(..., heads, L, D)``.
        key: Shape ``(..., heads, S, D)``.
        value: Shape ``(..., heads, S, E)``.
        attn_mask: Booleans (true takes part) or values to add, broadcasts to ``(..., L, S)``.
        dropout_p: Share of the weights to drop.
        is_causal: Position ``i`` sees positions up to ``i``.
        scale: Multiplies the products; ``1 / sqrt(D)`` if ``None``.
        enable_gqa: Keys and values have fewer heads, each for several of the queries'.

    Returns:
        Shape ``(..., heads, L, E)``.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        later = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None:
        is_choice = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_choice else scores + attn_mask
    weights = F.softmax(scores, -1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value)


def can_take_apart(module: nn.Module) -> bool:
    """Whether ``multi_head`` computes what ``module`` computes."""
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
    )


def multi_head(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what ``nn.MultiheadAttention`` returns for the same arguments, in parts.

    Args:
        module: The module, for its parameters and settings.
        query: Shape ``(N, L, E)`` or ``(L, N, E)``, as ``batch_first`` says.
        key: The same with length ``S``.
        value: The same with length ``S``.
        key_padding_mask: True leaves a key out, or values to add. Shape ``(N, S)``.
        need_weights: Return the attention weights too.
        attn_mask: True leaves a pair out, or values to add. Shape ``(L, S)`` or
            ``(N * heads, L, S)``.
        average_attn_weights: Over the heads.
        is_causal: A hint that ``attn_mask`` is the causal one.
    """
    del is_causal  # the mask says the same
    projected = _project(module, query, key, value)
    if not module.batch_first:
        projected = [x.transpose(0, 1) for x in projected]
    q, k, v = (_split(x, module.num_heads) for x in projected)
    scores = torch.matmul(q, k.transpose(-2, -1)) * (1 / math.sqrt(module.head_dim))
    scores = _mask(scores, attn_mask, key_padding_mask, module.num_heads)
    weights = F.softmax(scores, -1)
    if module.training and module.dropout > 0:
        weights = F.dropout(weights, module.dropout, True)
    heads = torch.matmul(weights, v).transpose(1, 2).flatten(2)
    result = module.out_proj(heads)
    result = result if module.batch_first else result.transpose(0, 1)
    if not need_weights:
        return result, None
    return result, weights.mean(1) if average_attn_weights else weights


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    if module._qkv_same_embed_dim and query is key and key is value:
        packed = F.linear(query, module.in_proj_weight, module.in_proj_bias)
        return list(packed.chunk(3, -1))
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]


def _split(x: Tensor, heads: int) -> Tensor:
    """Return ``(N, L, E)`` as ``(N, heads, L, E / heads)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _mask(scores: Tensor, pairs: Tensor | None, keys: Tensor | None, heads: int) -> Tensor:
    if pairs is not None and pairs.ndim == 3:
        pairs = pairs.unflatten(0, (-1, heads))
    if keys is not None:
        keys = keys[:, None, None, :]
    for mask in (pairs, keys):
        if mask is not None:
            is_choice = mask.dtype == torch.bool
            scores = scores.masked_fill(mask, -math.inf) if is_choice else scores + mask
    return scores
