"""Causal language models of Hugging Face transformers as lists of layers; the extra ``hf``.

:func:`causal_lm_layers` makes them, :class:`CausalLM` is a LightningModule around them, :func:`save_pretrained` writes them back.
"""

from __future__ import annotations

from lightning_sentinel.models.huggingface.building import causal_lm_layers
from lightning_sentinel.models.huggingface.channels import tokens_and_mask
from lightning_sentinel.models.huggingface.exporting import save_pretrained
from lightning_sentinel.models.huggingface.families import FAMILIES, Family
from lightning_sentinel.models.huggingface.module import CausalLM
from lightning_sentinel.models.huggingface.router import router_loss

__all__ = [
    "FAMILIES",
    "CausalLM",
    "Family",
    "causal_lm_layers",
    "router_loss",
    "save_pretrained",
    "tokens_and_mask",
]
