"""Small models that are already lists of layers, for the examples, the benchmarks and the tests."""

from __future__ import annotations

from lightning_sentinel.models.llama import Attention, Block, SwiGLU, llama, llama_layers, rotary_tables, rotate

__all__ = ["Attention", "Block", "SwiGLU", "llama", "llama_layers", "rotary_tables", "rotate"]
