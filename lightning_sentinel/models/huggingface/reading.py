"""Weights from a folder, tensor by tensor: whoever wants some layers touches nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_sentinel.errors import ConfigurationError, UnsupportedVersionError
from lightning_sentinel.models.huggingface.configs import config_of, transformers_package
from lightning_sentinel.models.huggingface.families import family_of
from lightning_sentinel.models.huggingface.layers import LanguageModelLayer

__all__ = ["read_weights", "weight_files"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder has which tensor; of the files no more than a header is read.

    Raises:
        ConfigurationError: if there are no safetensors.
    """
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())
        return {key: folder / name for key, name in index["weight_map"].items()}
    if (folder / _SINGLE).is_file():
        with _opened(folder / _SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / _SINGLE)
    raise ConfigurationError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}, and weights are read from safetensors only. Load it with transformers and"
        " write it anew with save_pretrained."
    )


def read_weights(layers: Sequence[LanguageModelLayer], folder: Path) -> None:
    """Fill layers with what a folder has for them.

    Only the tensors of these layers are read, and only the files opened that hold them; how a checkpoint's tensors become
    parameters (other names, experts that are stacked) is left to transformers.

    Args:
        layers: of the model in the folder; their parameters are replaced by new ones.
        folder: one that ``save_pretrained`` wrote.

    Raises:
        ConfigurationError: if tensors are missing, or have other shapes.
        UnsupportedVersionError: if this transformers loads weights in another way.
    """
    if not layers:
        return
    loading, mapping = _loading_of_transformers()
    files = weight_files(folder)
    shell = _shell(layers)
    wanted = [path for layer in layers for path in layer.parts.values()]
    names = _tensors_of(wanted, files, folder)
    dtype = layers[0].config.dtype or torch.float32
    settings = transformers_package().modeling_utils.LoadStateDictConfig(
        dtype=dtype, dtype_plan=shell._get_dtype_plan(dtype), weight_mapping=mapping(shell)
    )
    with contextlib.ExitStack() as stack, _no_progress_bar():
        opened = {path: stack.enter_context(_opened(path)) for path in sorted({files[key] for key in names.values()})}
        slices = {name: opened[files[key]].get_slice(key) for name, key in names.items()}
        found, _ = loading(shell, slices, settings)
        _check(found, wanted, folder)
        for layer in layers:
            _own_memory(layer)


def _shell(layers: Sequence[LanguageModelLayer]) -> Any:
    """The unsplit model on the meta device, around the modules of these layers."""
    with torch.device("meta"):
        shell = transformers_package().AutoModelForCausalLM.from_config(layers[0].config)
    for layer in layers:
        for name, path in layer.parts.items():
            shell.set_submodule(path, getattr(layer, name))
    return shell


def _tensors_of(wanted: Iterable[str], files: dict[str, Path], folder: Path) -> dict[str, str]:
    """By the name that transformers is told, the name in the files, of all tensors of the wanted modules."""
    config = config_of(folder)
    family = family_of(config)

    def bare(name: str) -> str:
        # A checkpoint of the model without its head has no prefix.
        return name.removeprefix(f"{family.base}.")

    prefixes = tuple(f"{bare(path)}." for path in wanted)
    names = {key: key for key in files if bare(key).startswith(prefixes)}
    head = f"{family.head}.weight"
    if config.tie_word_embeddings and family.head in wanted and head not in files:
        names[head] = next(key for key in files if bare(key) == f"{family.tokens}.weight")
    return names


def _check(found: Any, wanted: Iterable[str], folder: Path) -> None:
    prefixes = tuple(f"{path}." for path in wanted)
    missing = sorted(key for key in found.missing_keys if key.startswith(prefixes))
    others = {"mismatched": found.mismatched_keys, "not converted": found.conversion_errors, "failed": found.error_msgs}
    wrong = [f"{what}: {sorted(map(str, which))[:4]}" for what, which in {"missing": missing, **others}.items() if which]
    if wrong:
        raise ConfigurationError(
            f"The weights in {folder} are not those of its config.json ({'; '.join(wrong)}). Look whether all files were copied,"
            " and whether overrides change the size of anything."
        )


def _own_memory(layer: LanguageModelLayer) -> None:
    """What was read may still be the mapped file, and one memory where two layers read the same tensor."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data = tensor.data.clone()


def _loading_of_transformers() -> tuple[Any, Any]:
    transformers = transformers_package()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
    except ImportError as error:
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__} has no {error.name}, by which weights are read. Use a version of transformers"
            " that is named in the extra 'hf'."
        ) from error
    return convert_and_load_state_dict_in_model, get_model_conversion_mapping


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:
        raise ConfigurationError(f"{path} cannot be read as safetensors ({error}). Copy the file again.") from error


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """One of each rank would be too many."""
    logging = transformers_package().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
