"""From a config or a folder to the list of layers that a pipeline is cut from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_sentinel.models.huggingface.configs import Source, config_of, folder_of, transformers_package
from lightning_sentinel.models.huggingface.families import Family, family_of
from lightning_sentinel.models.huggingface.layers import Block, Embedding, Head, LanguageModelLayer, Norm, Router
from lightning_sentinel.models.huggingface.reading import read_weights

__all__ = ["causal_lm_layers"]


def causal_lm_layers(
    source: Source, overrides: Mapping[str, Any] | None = None, only: Iterable[int] | None = None
) -> nn.Sequential:
    """A causal language model of transformers as an ``nn.Sequential``: embedding, decoder blocks, norm, head.

    Logits are bit for bit those of the unsplit model. From a config, weights are drawn as transformers draws them, so that the same
    seed gives the same model. A head that shares its weights with the embedding gets a copy of its own, because the first and the
    last stage of a pipeline are in different places; from then on the two are trained apart.

    Args:
        source: a folder that ``save_pretrained`` wrote, with its weights as safetensors; a config; or a dict of a config's values
            with the key ``model_type``.
        overrides: values that replace those of the config, such as ``{"output_router_logits": True}`` to train a router loss.
        only: numbers of the layers whose weights are read from the folder; the others stay on torch's meta device, where they take
            no memory, and none of their tensors is read.

    Returns:
        ``config.num_hidden_layers + 3`` layers. The first takes tokens ``(B, T)`` or
        :func:`~lightning_sentinel.models.huggingface.tokens_and_mask`, the last returns logits ``(B, T, V)``, behind which with
        ``output_router_logits`` come the ``2 * E`` channels that :func:`~lightning_sentinel.models.huggingface.router_loss` takes.

    Raises:
        ConfigurationError: if the family cannot be cut, or the folder does not hold what it should.
        MissingExtraError: if transformers is not installed.

    Example:
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = causal_lm_layers({"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, **sizes})
        >>> [type(layer).__name__ for layer in model]
        ['Embedding', 'Block', 'Block', 'Norm', 'Head']
        >>> model(torch.tensor([[7, 1, 2]])).shape
        torch.Size([1, 3, 64])
    """
    config, folder = config_of(source, overrides), folder_of(source)
    family = family_of(config)
    from_config = transformers_package().AutoModelForCausalLM.from_config
    if folder is None:
        layers = _cut(from_config(config), family)
    else:
        with torch.device("meta"):
            layers = _cut(from_config(config), family)
        wanted = range(len(layers)) if only is None else only
        read_weights([layers[index] for index in wanted], folder)
    return nn.Sequential(*layers)


def _cut(model: Any, family: Family) -> list[LanguageModelLayer]:
    config, base = model.config, model.get_submodule(family.base)
    experts = int(config.num_experts) if family.router_loss and config.output_router_logits else 0
    head = model.get_submodule(family.head)
    if config.tie_word_embeddings:
        # Said in the config as well, which all layers share, so that what is exported has a head of its own.
        config.tie_word_embeddings = False
        head.weight = nn.Parameter(head.weight.detach().clone())
    blocks = f"{family.base}.{family.blocks}"
    return [
        _embedding(model, family, experts),
        *(
            Block(
                config,
                experts,
                {"block": f"{blocks}.{index}"},
                block,
                rotary=_rotary(base, family),
                windowed=_windowed(config, family, index),
                router=_router(model, block) if experts else None,
            )
            for index, block in enumerate(model.get_submodule(blocks))
        ),
        Norm(config, experts, {"norm": f"{family.base}.{family.norm}"}, base.get_submodule(family.norm)),
        Head(config, experts, {"head": family.head}, head),
    ]


def _embedding(model: Any, family: Family, experts: int) -> Embedding:
    parts = {"tokens": f"{family.base}.{family.tokens}"}
    if family.positions is not None:
        parts["positions"] = f"{family.base}.{family.positions}"
    inputs = {name: model.get_submodule(path) for name, path in parts.items()}
    if family.dropout is not None:
        inputs["dropout"] = model.get_submodule(f"{family.base}.{family.dropout}")
    return Embedding(model.config, experts, parts, **inputs)


def _rotary(base: Any, family: Family) -> nn.Module | None:
    """A new one, whose tables are made here and now: those of a model on the meta device hold no values."""
    if family.rotary is None:
        return None
    with torch.device("cpu"):
        made: nn.Module = type(base.get_submodule(family.rotary))(base.config)
    return made


def _windowed(config: Any, family: Family, index: int) -> bool:
    if family.window == "by layer":
        return bool(config.layer_types[index] == "sliding_attention")
    return family.window == "all" and config.sliding_window is not None


def _router(model: Any, block: nn.Module) -> Router | None:
    """The router inside a block, and which of its outputs transformers itself takes for the logits; ``None`` in a dense block."""
    recorder = model._can_record_outputs["router_logits"]
    names = [name for name, part in block.named_modules() if isinstance(part, recorder.target_class)]
    return Router(names[0], recorder.index) if names else None
