"""A small GPT: a language model that predicts every next token of a sequence.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: layer-norms in
front of attention and of the perceptron, learned positions, GELU. Left out: dropout, and biases of
the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import ConfigError
from qat.kinds import require_all, whole
from qat.memory import check_fits

KINDS = {
    "context": whole(1, 2**20),
    "width": whole(1, 2**16),
    "depth": whole(1, 1000),
    "heads": whole(1, 2**10),
}


class Attention(nn.Module):
    """Causal attention with several heads.

    Args:
        width: Features of a token.
        heads: Heads; they divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens ``(B, T, width)``, each with those before it; the same shape."""
        batch, length, width = x.shape[0], x.shape[1], self.out.in_features
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(
            q.view(split).transpose(1, 2),
            k.view(split).transpose(1, 2),
            v.view(split).transpose(1, 2),
            is_causal=True,
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer-norm and beside a shortcut.

    Args:
        width: Features of a token.
        heads: Heads of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the tokens ``(B, T, width)``; the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder of ``depth`` blocks between an embedding and a head.

    Args:
        num_classes: Tokens that there are.
        context: Tokens of a sequence.
        width: Features of a token.
        depth: Blocks.
        heads: Heads of the attention.
        tied: Whether the head's weight is the embedding's.

    Raises:
        ConfigError: If a size is out of range, or the weights do not fit into memory.
        ValueError: If the heads do not divide the width.
    """

    def __init__(
        self,
        num_classes: int,
        context: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        tied: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"context": context, "width": width, "depth": depth, "heads": heads}
        require_all("model.", sizes, KINDS)
        weights = 12 * depth * width**2 + (2 * num_classes + context) * width
        check_fits(4 * weights, "the weights of gpt", "lower its sizes", ConfigError)
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.token = nn.Embedding(num_classes, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes, bias=False)
        self._initialise(depth)
        if tied:
            self.head.weight = self.token.weight

    def _initialise(self, depth: int) -> None:
        """Draw weights as GPT-2 does: those that end a shortcut smaller, the deeper the model."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                ends = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if ends else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every next token ``(B, T, num_classes)``.

        Args:
            x: Tokens, int64, shape (B, T) with T the context.
        """
        return self.head(self.norm(self.blocks(self.token(x) + self.position)))
