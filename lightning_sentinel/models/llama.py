"""A small Llama-like decoder in plain torch, built as a list of layers.

Every layer takes one tensor and returns one tensor, so that the list can be cut anywhere: between two blocks nothing
but the hidden states ``(B, T, C)`` travels. The rotary tables and the causal mask are not passed along; each block has
its own.

The suffix of a tensor's name is its shape: B sequences, T tokens, C channels, H heads, D channels of one head, P pairs
of those channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sentinel.errors import ConfigurationError

__all__ = ["Attention", "Block", "SwiGLU", "llama", "llama_layers", "rotary_tables", "rotate"]

_INIT_STD = 0.02
_NORM_EPS = 1e-5
_ROTARY_BASE = 10_000.0
_HIDDEN_MULTIPLE = 8


def rotary_tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of the positions ``0..length - 1``.

    Position ``t`` turns the pair ``i`` of a head's channels by ``t / 10000 ** (2 * i / head_dim)``
    (RoFormer, arXiv 2104.09864, equation 15).

    Args:
        length: how many positions.
        head_dim: channels of one head, an even number.

    Returns:
        Two float32 tensors of shape ``(length, head_dim / 2)``.

    Example:
        >>> cos, sin = rotary_tables(length=3, head_dim=4)
        >>> cos.shape, sin[0]
        (torch.Size([3, 2]), tensor([0., 0.]))
    """
    frequencies = _ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BHTD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Turn every pair ``(i, i + D / 2)`` of channels by its angle.

    Args:
        x_BHTD: queries or keys, ``(..., T, D)``.
        cos_TP: cosines, ``(T, D / 2)``.
        sin_TP: sines, ``(T, D / 2)``.

    Returns:
        A tensor of the shape and type of the input. The length of every pair is kept.

    Example:
        >>> cos, sin = torch.tensor([[0.0]]), torch.tensor([[1.0]])
        >>> rotate(torch.tensor([[3.0, 4.0]]), cos, sin)
        tensor([[-4.,  3.]])
    """
    real, imaginary = x_BHTD.chunk(2, dim=-1)
    cos = cos_TP.to(x_BHTD.dtype)
    sin = sin_TP.to(x_BHTD.dtype)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)


def _linear(inputs: int, outputs: int, std: float = _INIT_STD) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions.

    Args:
        width: channels C of the hidden states.
        heads: attention heads; ``width / heads`` must be an even whole number.
        max_length: the longest sequence, for which the rotary tables are made.
        out_std: standard deviation of the initial weights of the output projection.

    Raises:
        ConfigurationError: if ``width`` cannot be split into heads with an even number of channels.

    Example:
        >>> Attention(width=8, heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, max_length: int = 1024, out_std: float = _INIT_STD) -> None:
        super().__init__()
        _check_sizes(width=width, heads=heads, max_length=max_length)
        _check_heads(width, heads)
        self.heads = heads
        self.max_length = max_length
        self.qkv = _linear(width, 3 * width)
        self.out = _linear(width, width, std=out_std)
        cos, sin = rotary_tables(max_length, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Mix every token with those before it, ``(B, T, C) -> (B, T, C)``.

        Raises:
            ConfigurationError: if T is greater than ``max_length``.
        """
        length = x_BTC.shape[1]
        if length > self.max_length:
            raise ConfigurationError(
                f"A sequence of {length} tokens is too long for this model, which was built with"
                f" max_length={self.max_length}: use shorter sequences, or build it with max_length={length}."
            )
        qkv_BHTD = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x_BTC).chunk(3, dim=-1))
        q_BHTD, k_BHTD, v_BHTD = qkv_BHTD
        cos_TP = self.cos[:length]
        sin_TP = self.sin[:length]
        y_BHTD = F.scaled_dot_product_attention(
            rotate(q_BHTD, cos_TP, sin_TP), rotate(k_BHTD, cos_TP, sin_TP), v_BHTD, is_causal=True
        )
        y_BTC: Tensor = self.out(y_BHTD.transpose(1, 2).flatten(2))
        return y_BTC


class SwiGLU(nn.Module):
    """The gated feed-forward network ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202).

    Args:
        width: channels C of the hidden states.
        hidden: channels between the projections.
        out_std: standard deviation of the initial weights of the output projection.

    Example:
        >>> SwiGLU(width=8, hidden=16)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, hidden: int, out_std: float = _INIT_STD) -> None:
        super().__init__()
        self.gate = _linear(width, hidden)
        self.up = _linear(width, hidden)
        self.down = _linear(hidden, width, std=out_std)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Transform every token on its own, ``(B, T, C) -> (B, T, C)``."""
        y_BTC: Tensor = self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))
        return y_BTC


class Block(nn.Module):
    """One decoder block: attention, then SwiGLU, each behind an RMSNorm (arXiv 1910.07467) and a residual connection.

    Args:
        width: channels C of the hidden states.
        heads: attention heads.
        depth: blocks in the whole model. The projections that write to the residual stream start smaller by
            ``1 / sqrt(2 * depth)``, so that its variance does not grow with the depth (GPT-2, section 2.3).
        max_length: the longest sequence.
        mlp_ratio: hidden channels of the SwiGLU per channel, rounded up to a multiple of 8.

    Raises:
        ConfigurationError: if a size is not positive, or ``width`` cannot be split into heads.

    Example:
        >>> Block(width=8, heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, depth: int = 1, max_length: int = 1024, mlp_ratio: float = 8 / 3) -> None:
        super().__init__()
        _check_sizes(depth=depth, mlp_ratio=mlp_ratio)
        out_std = _INIT_STD / math.sqrt(2 * depth)
        self.attention = Attention(width, heads, max_length, out_std)
        self.attention_norm = nn.RMSNorm(width, eps=_NORM_EPS)
        self.mlp = SwiGLU(width, _HIDDEN_MULTIPLE * math.ceil(mlp_ratio * width / _HIDDEN_MULTIPLE), out_std)
        self.mlp_norm = nn.RMSNorm(width, eps=_NORM_EPS)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Add what the two branches found to the residual stream, ``(B, T, C) -> (B, T, C)``."""
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC))
        y_BTC: Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return y_BTC


def llama_layers(
    vocab_size: int, width: int, depth: int, heads: int, max_length: int = 1024, mlp_ratio: float = 8 / 3
) -> list[nn.Module]:
    """The layers of a Llama-like decoder (arXiv 2302.13971): embedding, ``depth`` blocks, RMSNorm, linear head.

    Args:
        vocab_size: how many tokens V there are.
        width: channels C of the hidden states.
        depth: how many blocks.
        heads: attention heads; ``width / heads`` must be an even whole number.
        max_length: the longest sequence.
        mlp_ratio: hidden channels of the SwiGLU per channel, rounded up to a multiple of 8.

    Returns:
        ``depth + 3`` layers. The first takes int64 tokens ``(B, T)``, the last returns logits ``(B, T, V)``, and
        ``(B, T, C)`` goes from each layer to the next.

    Raises:
        ConfigurationError: if a size is not positive, or ``width`` cannot be split into heads with an even number of
            channels.

    Example:
        >>> layers = llama_layers(vocab_size=256, width=8, depth=2, heads=2)
        >>> [type(layer).__name__ for layer in layers]
        ['Embedding', 'Block', 'Block', 'RMSNorm', 'Linear']
    """
    _check_sizes(vocab_size=vocab_size, width=width, depth=depth)
    embedding = nn.Embedding(vocab_size, width)
    nn.init.normal_(embedding.weight, std=_INIT_STD)
    blocks = [Block(width, heads, depth, max_length, mlp_ratio) for _ in range(depth)]
    return [embedding, *blocks, nn.RMSNorm(width, eps=_NORM_EPS), _linear(width, vocab_size)]


def llama(vocab_size: int, width: int, depth: int, heads: int, max_length: int = 1024, mlp_ratio: float = 8 / 3) -> nn.Sequential:
    """The layers of :func:`llama_layers`, with the same arguments, as one model.

    Example:
        >>> model = llama(vocab_size=256, width=8, depth=2, heads=2)
        >>> model(torch.tensor([[7, 1, 2]])).shape
        torch.Size([1, 3, 256])
    """
    return nn.Sequential(*llama_layers(vocab_size, width, depth, heads, max_length, mlp_ratio))


def _check_sizes(**sizes: float) -> None:
    for name, size in sizes.items():
        if size <= 0:
            raise ConfigurationError(f"{name}={size} leaves the model without parameters: it must be greater than 0.")


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ConfigurationError(
            f"width={width} cannot be split into heads={heads} equal heads: choose a width that is a multiple of heads."
        )
    if width // heads % 2:
        raise ConfigurationError(
            f"width={width} and heads={heads} make heads of {width // heads} channels, but rotary positions turn pairs"
            f" of channels: choose a width that is a multiple of {2 * heads}."
        )
