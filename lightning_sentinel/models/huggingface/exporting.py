"""Back to a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models.huggingface.building import config_to_cut, layers_of
from lightning_sentinel.models.huggingface.configs import transformers_package
from lightning_sentinel.models.huggingface.layers import Embedding, Head, LanguageModelLayer

__all__ = ["save_pretrained"]


def save_pretrained(
    source: nn.Module | str | os.PathLike[str], folder: str | os.PathLike[str], max_shard_size: str = "5GB"
) -> None:
    """Write a folder that transformers' ``from_pretrained`` loads, with the names and shapes that its family has on the hub.

    A checkpoint is mapped, and its weights go from file to file: no process needs memory for the model, but for stacked experts,
    which are taken apart in memory. The tokenizer is not the model's: copy it with
    ``AutoTokenizer.from_pretrained(old).save_pretrained(new)``.

    Args:
        source: a checkpoint of :class:`CausalLM`, in one file; or what :func:`causal_lm_layers` returned; or a module that holds
            its layers.
        folder: is made if there is none.
        max_shard_size: the largest size of a file of weights, as transformers writes it (``"5GB"``).

    Raises:
        ConfigurationError: if layers are missing, as they are on a rank that has one stage, or there is no such checkpoint.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> from lightning_sentinel.models import causal_lm_layers
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = causal_lm_layers({"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2, **sizes})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder)
        ...     type(AutoModelForCausalLM.from_pretrained(folder)).__name__
        'LlamaForCausalLM'
    """
    layers = _layers_in(source) if isinstance(source, nn.Module) else _layers_from(source)
    state = {key: value.detach() for layer in layers for key, value in layer.original_state().items()}
    config: Any = copy.deepcopy(layers[0].config)
    # That of the weights, which the user may have converted.
    config.dtype = next(iter(state.values())).dtype
    with torch.device("meta"):
        shell = transformers_package().AutoModelForCausalLM.from_config(config)
    shell.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def _layers_in(module: nn.Module) -> Sequence[LanguageModelLayer]:
    if isinstance(module, L.LightningModule):
        module.configure_model()  # does nothing if it has
    layers = [part for part in module.modules() if isinstance(part, LanguageModelLayer)]
    expected = layers[0].config.num_hidden_layers + 3 if layers else 0
    if not layers or len(layers) != expected:
        raise ConfigurationError(
            f"{type(module).__name__} has {len(layers)} layers of a language model{f' of {expected}' if expected else ''}, so it"
            " cannot be exported. After a run in a pipeline every process has its own stage only: save a checkpoint, and export"
            " that in one process."
        )
    return layers


def _layers_from(path: str | os.PathLike[str]) -> Sequence[LanguageModelLayer]:
    """Layers whose weights are mapped from a checkpoint."""
    if os.path.isdir(path):
        raise ConfigurationError(
            f"{os.fspath(path)!r} is a directory. Make one file of a sharded checkpoint by `lightning-sentinel consolidate DIR"
            " OUT`, which maps it as well, and export that."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        source = checkpoint["hyper_parameters"]["source"]
        state = checkpoint["state_dict"]
        weights = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
    except Exception as error:
        raise ConfigurationError(
            f"{os.fspath(path)!r} cannot be read as a checkpoint of CausalLM ({type(error).__name__}: {error}). Name a file that a"
            " Trainer saved of one; for another module, load it and export the module."
        ) from error
    with torch.device("meta"):
        layers = layers_of(config_to_cut(source), None)
    layers.load_state_dict(weights, assign=True)
    embedding = layers[0]
    head = layers[-1]
    if isinstance(embedding, Embedding) and isinstance(head, Head) and head.config.tie_word_embeddings:
        # The checkpoint of a pipeline has it from two stages.
        head.head.weight = embedding.tokens.weight
    return _layers_in(layers)
