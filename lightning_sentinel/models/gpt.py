"""A small GPT-2-like decoder in plain torch, built as a list of layers.

Beside :mod:`lightning_sentinel.models.llama` it is the second architecture that detection is measured on: learned positions that
are added once, LayerNorm with a bias, and GELU, where Llama has rotary positions, RMSNorm and a gate. As there, every layer takes
one tensor and returns one, so that the list can be cut anywhere.

The suffix of a tensor's name is its shape: B sequences, T tokens, C channels, H heads, D channels of one head.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sentinel.errors import ConfigurationError

__all__ = ["GPTBlock", "TokenEmbedding", "gpt", "gpt_layers"]

_INIT_STD = 0.02


def _require_positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if size <= 0:
            raise ConfigurationError(f"{name}={size} leaves the model without parameters: it must be greater than 0.")


def _linear(inputs: int, outputs: int, std: float = _INIT_STD, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class TokenEmbedding(nn.Module):
    """The sum of what a token is and where it stands.

    Args:
        vocab_size: how many tokens there are.
        width: channels C of the hidden states.
        max_length: the longest sequence; each position has a vector of its own.

    Example:
        >>> import torch
        >>> TokenEmbedding(vocab_size=256, width=8, max_length=16)(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, vocab_size: int, width: int, max_length: int) -> None:
        super().__init__()
        _require_positive(vocab_size=vocab_size, width=width, max_length=max_length)
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_length, width)
        nn.init.normal_(self.token.weight, std=_INIT_STD)
        nn.init.normal_(self.position.weight, std=_INIT_STD)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look up every token, ``(B, T) -> (B, T, C)``.

        Raises:
            ConfigurationError: if T is greater than ``max_length``.
        """
        length = tokens_BT.shape[1]
        longest = self.position.num_embeddings
        if length > longest:
            raise ConfigurationError(
                f"A sequence of {length} tokens is too long for this model, which was built with max_length={longest}: use"
                f" shorter sequences, or build it with max_length={length}."
            )
        x_BTC: Tensor = self.token(tokens_BT) + self.position.weight[:length]
        return x_BTC


class GPTBlock(nn.Module):
    """One decoder block of GPT-2: causal attention, then GELU, each behind a LayerNorm and a residual connection.

    Args:
        width: channels C of the hidden states.
        heads: attention heads, a divisor of ``width``.
        depth: blocks in the whole model. The projections that write to the residual stream start smaller by
            ``1 / sqrt(2 * depth)`` (GPT-2, section 2.3).
        mlp_ratio: hidden channels per channel.

    Raises:
        ConfigurationError: if a size is not positive, or ``width`` cannot be split into heads.

    Example:
        >>> import torch
        >>> GPTBlock(width=8, heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, depth: int = 1, mlp_ratio: int = 4) -> None:
        super().__init__()
        _require_positive(width=width, depth=depth, mlp_ratio=mlp_ratio)
        if heads < 1 or width % heads:
            raise ConfigurationError(
                f"width={width} cannot be split into heads={heads} equal heads: choose a width that is a multiple of heads."
            )
        self.heads = heads
        out_std = _INIT_STD / math.sqrt(2 * depth)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = _linear(width, 3 * width)
        self.attention_out = _linear(width, width, out_std)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = _linear(width, mlp_ratio * width)
        self.mlp_out = _linear(mlp_ratio * width, width, out_std)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Add what the two branches found to the residual stream, ``(B, T, C) -> (B, T, C)``."""
        qkv_BTC = self.qkv(self.attention_norm(x_BTC)).chunk(3, dim=-1)
        q_BHTD, k_BHTD, v_BHTD = (y_BTC.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y_BTC in qkv_BTC)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x_BTC = x_BTC + self.attention_out(y_BHTD.transpose(1, 2).flatten(2))
        y_BTC: Tensor = x_BTC + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BTC)), approximate="tanh"))
        return y_BTC


def gpt_layers(vocab_size: int, width: int, depth: int, heads: int, max_length: int = 1024, mlp_ratio: int = 4) -> list[nn.Module]:
    """The layers of a GPT-2-like decoder (Radford et al., 2019): embedding, ``depth`` blocks, LayerNorm, linear head.

    The head has weights of its own. GPT-2 shares them with the embedding, but the first and the last stage of a pipeline are in
    different places.

    Args:
        vocab_size: how many tokens V there are.
        width: channels C of the hidden states.
        depth: how many blocks.
        heads: attention heads, a divisor of ``width``.
        max_length: the longest sequence.
        mlp_ratio: hidden channels of a block's second half, per channel.

    Returns:
        ``depth + 3`` layers. The first takes int64 tokens ``(B, T)``, the last returns logits ``(B, T, V)``, and ``(B, T, C)`` goes
        from each layer to the next.

    Raises:
        ConfigurationError: if a size is not positive, or ``width`` cannot be split into heads.

    Example:
        >>> layers = gpt_layers(vocab_size=256, width=8, depth=2, heads=2)
        >>> [type(layer).__name__ for layer in layers]
        ['TokenEmbedding', 'GPTBlock', 'GPTBlock', 'LayerNorm', 'Linear']
    """
    _require_positive(depth=depth)
    embedding = TokenEmbedding(vocab_size, width, max_length)
    blocks = [GPTBlock(width, heads, depth, mlp_ratio) for _ in range(depth)]
    return [embedding, *blocks, nn.LayerNorm(width), _linear(width, vocab_size, bias=False)]


def gpt(vocab_size: int, width: int, depth: int, heads: int, max_length: int = 1024, mlp_ratio: int = 4) -> nn.Sequential:
    """The layers of :func:`gpt_layers`, with the same arguments, as one model.

    Example:
        >>> import torch
        >>> model = gpt(vocab_size=256, width=8, depth=2, heads=2)
        >>> model(torch.tensor([[7, 1, 2]])).shape
        torch.Size([1, 3, 256])
    """
    return nn.Sequential(*gpt_layers(vocab_size, width, depth, heads, max_length, mlp_ratio))
