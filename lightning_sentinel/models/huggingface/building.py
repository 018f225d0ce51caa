"""From a config or a folder to the list of layers that a pipeline is cut from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_sentinel.models.huggingface.configs import Source, config_of, folder_of, transformers_package
from lightning_sentinel.models.huggingface.families import Family, family_of
from lightning_sentinel.models.huggingface.layers import Block, Embedding, Head, LanguageModelLayer, Norm, Router
from lightning_sentinel.models.huggingface.reading import head_of_its_own, read_weights

__all__ = ["causal_lm_layers", "config_to_cut", "layers_of"]


def causal_lm_layers(source: Source, overrides: Mapping[str, Any] | None = None) -> nn.Sequential:
    """A causal language model of transformers as an ``nn.Sequential``: embedding, decoder blocks, norm, head.

    Logits are bit for bit those of the unsplit model. From a config, weights are drawn as transformers draws them, so that the same
    seed gives the same model. A head that is tied to the embedding shares its parameter, in a pipeline across stages.

    Called in ``configure_model``, under the strategy, each process draws or reads its own stage only; the files of a folder that
    have nothing of it are not opened.

    Args:
        source: a folder that ``save_pretrained`` wrote, with its weights as safetensors; a config; or a dict of a config's values
            with the key ``model_type``.
        overrides: values that replace those of the config, such as ``{"output_router_logits": True}`` to train a router loss.

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
    return layers_of(config_to_cut(source, overrides), folder_of(source))


def config_to_cut(source: Source, overrides: Mapping[str, Any] | None = None) -> Any:
    """The config of a model that can be cut, as its weights are.

    Raises:
        ConfigurationError: if the family cannot be cut, or the folder does not hold what it should.
        MissingExtraError: if transformers is not installed.

    Example:
        >>> config_to_cut({"model_type": "llama", "num_hidden_layers": 2}).num_hidden_layers
        2
    """
    config = config_of(source, overrides)
    folder = folder_of(source)
    family_of(config)
    if folder is not None and config.tie_word_embeddings and head_of_its_own(folder):
        rank_zero_warn(
            f"{folder} has a head beside the embedding, with other values, so that the two are not tied, although its config says"
            " tie_word_embeddings=True. overrides={'tie_word_embeddings': False} says so without this warning."
        )
        config.tie_word_embeddings = False
    return config


def layers_of(config: Any, folder: Path | None) -> nn.Sequential:
    """The layers of a model of this config, with the weights of a folder, or drawn where there is none.

    Args:
        config: what :func:`config_to_cut` returned; the layers keep it.
        folder: that it is of.

    Raises:
        ConfigurationError: if the folder does not hold what it should.
    """
    from_config = transformers_package().AutoModelForCausalLM.from_config
    if folder is None:
        model = from_config(config)
    else:
        with torch.device("meta"):
            model = from_config(config)
        read_weights(model, folder)
    return nn.Sequential(*_cut(model, family_of(config)))


def _cut(model: Any, family: Family) -> list[LanguageModelLayer]:
    config = model.config
    base = model.get_submodule(family.base)
    experts = int(config.num_experts) if family.router_loss and config.output_router_logits else 0
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
        Head(config, experts, {"head": family.head}, model.get_submodule(family.head)),
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
