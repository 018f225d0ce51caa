"""A tiny config of each family that can be cut, with windows, several kinds of layers and experts switched on where it has them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

# What is not in a local folder cannot be had.
os.environ["HF_HUB_OFFLINE"] = "1"

VOCABULARY, LENGTH, PADDING = 67, 12, 0

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PADDING,
}
_WINDOWS_FROM_THE_SECOND_ON = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "mistral": _SIZES | {"sliding_window": 5},
    "qwen2": _SIZES | _WINDOWS_FROM_THE_SECOND_ON,
    "qwen3": _SIZES | _WINDOWS_FROM_THE_SECOND_ON | {"head_dim": 8},
    "olmo2": _SIZES,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "qwen3_moe": _SIZES
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    "deepseek_v3": _SIZES
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
MIXTURES = ("mixtral", "qwen3_moe")


def config(family: str, **others: Any) -> Any:
    """A config of transformers."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(CONFIGS[family] | others))


def unsplit(family: str, seed: int = 0, **others: Any) -> Any:
    """The model as transformers makes it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(family, **others))


def tokens(samples: int = 3, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Tokens and their mask; the first row is whole, the others are padded on a side, or on both."""
    input_ids, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    if side in ("left", "both"):
        mask[1, :4] = 0
    if side in ("right", "both"):
        mask[1, -2:] = mask[2, -5:] = 0
    return input_ids.masked_fill(mask == 0, PADDING), mask
