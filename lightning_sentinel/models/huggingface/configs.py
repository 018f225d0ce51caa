"""From a folder or a dict to a config of transformers."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sentinel.errors import ConfigurationError, MissingExtraError

__all__ = ["Source", "config_of", "folder_of", "transformers_package"]

# In this order, because jsonargparse takes the first that fits, and a mapping can be made a str.
Source = Mapping[str, Any] | str | os.PathLike[str]
"""A folder that ``save_pretrained`` wrote, or what a config is made of; the config itself will do as well."""


def transformers_package() -> Any:
    """The package ``transformers``.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf", "A Hugging Face model") from None
    return transformers


def folder_of(source: Any) -> Path | None:
    """The folder that ``source`` names; ``None`` if it is a config.

    Raises:
        ConfigurationError: if there is no such folder, or no model in it.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = Path(source)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder on this machine"
        raise ConfigurationError(
            f"{str(source)!r} {what}, and models are read from local folders only. Download the model first (hf download NAME"
            " --local-dir FOLDER), or write one with transformers' save_pretrained."
        )
    return folder


def config_of(source: Any, overrides: Mapping[str, Any] | None = None) -> Any:
    """A config of transformers, always one of its own.

    Args:
        source: a folder, a mapping with the key ``model_type``, or a config.
        overrides: values that replace the config's.

    Raises:
        ConfigurationError: if there is none, or it has no value of that name.
        MissingExtraError: if transformers is not installed.

    Example:
        >>> config_of({"model_type": "llama", "num_hidden_layers": 2}, {"vocab_size": 100}).vocab_size
        100
    """
    transformers = transformers_package()
    overrides = dict(overrides or {})
    if "attn_implementation" in overrides:
        # What transformers calls it as an argument and what as an attribute.
        overrides["_attn_implementation"] = overrides.pop("attn_implementation")
    folder = folder_of(source)
    if folder is not None:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    elif isinstance(source, Mapping):
        values = dict(source)
        kind = values.pop("model_type", None)
        if kind not in transformers.CONFIG_MAPPING:
            raise ConfigurationError(
                f"A config with model_type={kind!r} is none that transformers knows. Give the model_type of a family, such as"
                " 'llama', beside the other values."
            )
        # Together, because some values are derived from others when a config is made.
        names = [name for name in overrides if hasattr(transformers.CONFIG_MAPPING[kind](), name)]
        values |= {name: overrides.pop(name) for name in names}
        config = transformers.AutoConfig.for_model(kind, **values)
    elif isinstance(source, transformers.PreTrainedConfig):
        config = copy.deepcopy(source)
    else:
        raise ConfigurationError(
            f"A {type(source).__name__} is no model. Give a folder that save_pretrained wrote, a config of transformers, or a dict"
            " of its values with the key 'model_type'."
        )
    unknown = sorted(name for name in overrides if not hasattr(config, name))
    if unknown:
        raise ConfigurationError(
            f"overrides={unknown} name nothing that a config with model_type={config.model_type!r} has. Look the names up in the"
            " folder's config.json."
        )
    for name, value in overrides.items():
        setattr(config, name, value)
    return config
