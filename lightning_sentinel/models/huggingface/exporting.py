"""Back to a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models.huggingface.configs import transformers_package
from lightning_sentinel.models.huggingface.layers import LanguageModelLayer

__all__ = ["save_pretrained"]


def save_pretrained(module: nn.Module, folder: str | os.PathLike[str], max_shard_size: str = "5GB") -> None:
    """Write a folder that transformers' ``from_pretrained`` loads, with the names and shapes that its family has on the hub.

    The head is written as it was trained, and the config says that it is not tied to the embedding. The tokenizer is not the
    model's: copy it with ``AutoTokenizer.from_pretrained(old).save_pretrained(new)``.

    Args:
        module: what :func:`causal_lm_layers` returned, or a module that holds its layers, such as :class:`CausalLM`.
        folder: is made if there is none.
        max_shard_size: of a file of weights, as transformers writes it.

    Raises:
        ConfigurationError: if layers are missing, as they are on a rank that has one stage.

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
    layers = [part for part in module.modules() if isinstance(part, LanguageModelLayer)]
    expected = layers[0].config.num_hidden_layers + 3 if layers else 0
    if not layers or len(layers) != expected:
        raise ConfigurationError(
            f"{type(module).__name__} has {len(layers)} layers of a language model{f' of {expected}' if expected else ''}, so it"
            " cannot be exported. After a run in a pipeline every process has its own stage only: save a checkpoint, load it with"
            " load_from_checkpoint in one process, and export that."
        )
    state = {key: value.detach() for layer in layers for key, value in layer.original_state().items()}
    config: Any = copy.deepcopy(layers[0].config)
    # That of the weights, which the user may have converted.
    config.dtype = next(iter(state.values())).dtype
    with torch.device("meta"):
        shell = transformers_package().AutoModelForCausalLM.from_config(config)
    shell.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
