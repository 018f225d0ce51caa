"""Small models that are already lists of layers, for the examples, the benchmarks and the tests."""

from __future__ import annotations

from lightning_sentinel.models.gpt import GPTBlock, TokenEmbedding, gpt, gpt_layers
from lightning_sentinel.models.llama import Attention, Block, SwiGLU, llama, llama_layers, rotary_tables, rotate

__all__ = [
    "Attention",
    "Block",
    "GPTBlock",
    "SwiGLU",
    "TokenEmbedding",
    "gpt",
    "gpt_layers",
    "llama",
    "llama_layers",
    "rotary_tables",
    "rotate",
]
