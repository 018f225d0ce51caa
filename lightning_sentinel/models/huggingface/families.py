"""Which causal language models of transformers can be cut, and what their parts are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning_sentinel.errors import ConfigurationError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """Where the parts of a causal language model sit in transformers' own module.

    Args:
        title: what people call it.
        base: attribute of the model without its head.
        tokens: name of the embedding of tokens, in the base model.
        positions: name of the embedding of positions, in the base model; ``None`` where positions are rotary.
        dropout: name of the dropout of the sum of both embeddings, in the base model.
        blocks: name of the list of decoder blocks, in the base model.
        norm: name of the norm after the last block, in the base model.
        head: name of the head, in the model.
        rotary: name of the module that makes rotary tables, in the base model.
        window: which blocks look back only as far as ``config.sliding_window``: none, all once it is set, or those that
            ``config.layer_types`` names.
        router_loss: whether transformers adds a load-balancing loss to this family's loss.
    """

    title: str
    base: str = "model"
    tokens: str = "embed_tokens"
    positions: str | None = None
    dropout: str | None = None
    blocks: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    rotary: str | None = "rotary_emb"
    window: Literal["none", "all", "by layer"] = "none"
    router_loss: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window="all"),
    "qwen2": Family("Qwen2", window="by layer"),
    "qwen3": Family("Qwen3", window="by layer"),
    "olmo2": Family("OLMo 2"),
    "gpt2": Family(
        "GPT-2", base="transformer", tokens="wte", positions="wpe", dropout="drop", blocks="h", norm="ln_f", rotary=None
    ),
    "mixtral": Family("Mixtral", window="all", router_loss=True),
    "qwen3_moe": Family("Qwen3-MoE", window="all", router_loss=True),
    "deepseek_v3": Family("DeepSeek-V3"),
}
"""By ``config.model_type``: those whose split model is held against the unsplit one by the tests."""


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        ConfigurationError: if models of this kind cannot be cut, or are quantised.

    Example:
        >>> from types import SimpleNamespace
        >>> family_of(SimpleNamespace(model_type="llama")).title
        'Llama'
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ConfigurationError(
            f"Models with model_type={kind!r} cannot be cut into pipeline layers yet: what their blocks need besides the hidden"
            f" states is not known. Those that can: {', '.join(sorted(FAMILIES))}. For another one write a LightningModule with"
            " its layers in an nn.Sequential."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(
            f"This {FAMILIES[kind].title} has quantised weights (its config has a quantization_config), which cannot be trained in"
            " a pipeline. Start from a folder with its weights in float32 or bfloat16."
        )
    return FAMILIES[kind]
