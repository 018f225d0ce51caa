"""Models that are lists of layers: small ones for the examples, the benchmarks and the tests, and those of Hugging Face."""

from __future__ import annotations

from lightning_sentinel.models.gpt import GPTBlock, TokenEmbedding, gpt, gpt_layers
from lightning_sentinel.models.huggingface import CausalLM, causal_lm_layers, router_loss, save_pretrained, tokens_and_mask
from lightning_sentinel.models.llama import Attention, Block, SwiGLU, llama, llama_layers, rotary_tables, rotate

__all__ = [
    "Attention",
    "Block",
    "CausalLM",
    "GPTBlock",
    "SwiGLU",
    "TokenEmbedding",
    "causal_lm_layers",
    "gpt",
    "gpt_layers",
    "llama",
    "llama_layers",
    "rotary_tables",
    "rotate",
    "router_loss",
    "save_pretrained",
    "tokens_and_mask",
]
