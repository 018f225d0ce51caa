"""Weights from a folder, parameter by parameter, each when it is wanted.

Reading one is an operation of torch's, as drawing random numbers is. So code that defers operations on tensors, as the strategy
does in ``configure_model``, puts off reading too, and a process reads what it keeps.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sentinel.errors import ConfigurationError, UnsupportedVersionError
from lightning_sentinel.models.huggingface.configs import config_of, transformers_package
from lightning_sentinel.models.huggingface.families import family_of

__all__ = ["head_of_its_own", "read_weights", "weight_files"]

_PIECE = 2**24
"""Bytes that are compared at a time."""
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder has which tensor; of the files no more than a header is read.

    Raises:
        ConfigurationError: if there are no safetensors.
    """
    file = _listing(folder)
    if file.name == _INDEX:
        return {key: folder / name for key, name in json.loads(file.read_text())["weight_map"].items()}
    with _opened(file) as content:
        return dict.fromkeys(content.keys(), file)


def read_weights(model: Any, folder: Path) -> None:
    """Give a model without values those of a folder.

    How a checkpoint's tensors become parameters (other names, experts that are stacked) is left to transformers. A parameter takes
    its own memory and, while it is read, that of the tensors that it is made of.

    Args:
        model: transformers' own, on the meta device; its parameters are replaced by new ones, which are shared if they were.
        folder: one that ``save_pretrained`` wrote.

    Raises:
        ConfigurationError: if tensors are missing, or, once they are read, have other shapes.
        UnsupportedVersionError: if this transformers loads weights in another way.
    """
    source = _WeightFolder.at(folder)
    source.require(model.state_dict())
    dtypes = model._get_dtype_plan(model.config.dtype or torch.float32)
    made: dict[int, Tensor] = {}
    for path, part in model.named_modules():
        for entries in (part._parameters, part._buffers):
            for key, tensor in entries.items():
                if tensor is None or key in part._non_persistent_buffers_set:
                    continue
                if id(tensor) not in made:
                    name = f"{path}.{key}"
                    dtype = next((kept for pattern, kept in dtypes.items() if re.search(pattern, name)), tensor.dtype)
                    value = torch.empty(tensor.shape, dtype=dtype)
                    _read_parameter_(value, str(source.folder), name)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if parameter else value
                entries[key] = made[id(tensor)]


def head_of_its_own(folder: Path) -> bool:
    """Whether a folder has a head beside the embedding, with other values: then it is not tied, whatever the config says.

    That is transformers' rule. The two are read, a piece at a time, only where both are there.

    Raises:
        ConfigurationError: if a file cannot be read.
    """
    source = _WeightFolder.at(folder)
    keys = [key for name in source.tied for key in source.own_keys.get(name, [])]
    if len(keys) < 2:
        return False
    # As bytes, because an operation of torch may be put off, and the answer is wanted now.
    embedding, head = (_place(source.files[key], key) for key in keys)
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        return True
    with embedding.file.open("rb") as one, head.file.open("rb") as other:
        one.seek(embedding.start)
        other.seek(head.start)
        sizes = (min(_PIECE, embedding.stop - at) for at in range(embedding.start, embedding.stop, _PIECE))
        return any(one.read(size) != other.read(size) for size in sizes)


class _Place(NamedTuple):
    """Where a tensor is in a file, from which byte to which."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    stop: int


def _place(file: Path, key: str) -> _Place:
    with _opened(file), file.open("rb") as content:  # opened first, so that what is no such file is refused
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))[key]
    start, stop = (8 + length + offset for offset in header["data_offsets"])
    return _Place(file, header["dtype"], header["shape"], start, stop)


@torch.library.custom_op("lightning_sentinel::read_parameter_", mutates_args=("parameter",))
def _read_parameter_(parameter: Tensor, folder: str, name: str) -> None:
    """Fill ``parameter`` with what the model in ``folder`` has under ``name``."""
    parameter.copy_(_WeightFolder.at(Path(folder)).read(name, parameter))


@_read_parameter_.register_fake
def _(parameter: Tensor, folder: str, name: str) -> None:
    """Has a shape already."""


class _WeightFolder:
    """What a folder holds for the parameters of transformers' model.

    Args:
        folder: one that ``save_pretrained`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self._load, mapping, renamed = _loading_of_transformers()
        config = config_of(folder)
        family = family_of(config)
        with torch.device("meta"):
            self._shell = transformers_package().AutoModelForCausalLM.from_config(config)
        self._mapping = mapping(self._shell)
        self.tied = (f"{family.base}.{family.tokens}.weight", f"{family.head}.weight")
        self.own_keys = self._keys_by_name(renamed)

    @classmethod
    def at(cls, folder: Path) -> _WeightFolder:
        """The folder, of which no more than names and shapes is remembered until it is written anew."""
        folder = folder.absolute()  # it may be read once the process is elsewhere
        return _remembered(folder, *(file.stat().st_mtime_ns for file in (folder / "config.json", _listing(folder))))

    def _keys_by_name(self, renamed: Any) -> dict[str, list[str]]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        renamings, converters = (
            [entry for entry in self._mapping if isinstance(entry, kind)] for kind in (WeightRenaming, WeightConverter)
        )
        base = self._shell.base_model_prefix
        state = self._shell.state_dict()
        keys: defaultdict[str, list[str]] = defaultdict(list)
        for key in self.files:
            name, _ = renamed(key, renamings, converters, base, state)
            keys[name if name in state else key].append(key)  # what has its name already is not renamed
        return dict(keys)

    def keys(self, name: str) -> list[str]:
        """Names of the tensors that a parameter is made of; a head that is not there is the embedding, and the other way round."""
        if name in self.own_keys or name not in self.tied:
            return self.own_keys.get(name, [])
        return next((self.own_keys[other] for other in self.tied if other in self.own_keys), [])

    def require(self, names: Iterable[str]) -> None:
        """Check that something is there for each of these parameters.

        Raises:
            ConfigurationError: if not.
        """
        if missing := sorted(name for name in names if not self.keys(name)):
            raise self._wrong(f"missing: {missing[:4]}")

    def read(self, name: str, like: Tensor) -> Tensor:
        """The value of a parameter.

        Args:
            name: in transformers' model.
            like: what has the shape and the dtype that it should have.

        Raises:
            ConfigurationError: if it has another shape, or its file cannot be read.
        """
        path, _, key = name.rpartition(".")
        part = self._shell.get_submodule(path)
        entries = part._parameters if key in part._parameters else part._buffers
        settings = transformers_package().modeling_utils.LoadStateDictConfig(
            dtype=like.dtype, dtype_plan={re.escape(name): like.dtype}, weight_mapping=self._mapping
        )
        keys = self.keys(name)
        empty = entries[key]
        own = name in self.own_keys
        with torch.device("cpu"), _slices({key: self.files[key] for key in keys}) as slices, _no_progress_bar():
            try:
                found, _ = self._load(self._shell, slices if own else {name: slices[keys[0]]}, settings)
                value = entries[key]
            finally:
                entries[key] = empty
            if value.is_meta or value.shape != like.shape:
                problems = (*found.mismatched_keys, *found.conversion_errors.items(), *found.error_msgs)
                shapes = f"{name} is {tuple(value.shape)} instead of {tuple(like.shape)}"
                raise self._wrong(f"mismatched: {', '.join(map(str, problems)) or shapes}")
            return value.detach()

    def _wrong(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"The weights in {self.folder} are not those of its config.json ({what}). Look whether all files were copied, and"
            " whether overrides change the size of anything."
        )


@functools.lru_cache(maxsize=1)
def _remembered(folder: Path, *changed: int) -> _WeightFolder:
    return _WeightFolder(folder)


@contextlib.contextmanager
def _slices(files: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """What is read of tensors once it is asked for, while their files are open."""
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_opened(file)) for file in sorted(set(files.values()))}
        yield {key: opened[file].get_slice(key) for key, file in files.items()}


def _listing(folder: Path) -> Path:
    """The file that says which tensors there are."""
    for name in (_INDEX, _SINGLE):
        if (folder / name).is_file():
            return folder / name
    raise ConfigurationError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}, and weights are read from safetensors only. Load it with transformers and"
        " write it anew with save_pretrained."
    )


def _loading_of_transformers() -> tuple[Any, Any, Any]:
    transformers = transformers_package()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model, rename_source_key
    except ImportError as error:
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__} has no {error.name}, by which weights are read. Use a version of transformers"
            " that is named in the extra 'hf'."
        ) from error
    return convert_and_load_state_dict_in_model, get_model_conversion_mapping, rename_source_key


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:
        raise ConfigurationError(f"{path} cannot be read as safetensors ({error}). Copy the file again.") from error


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """One of each parameter would be too many."""
    logging = transformers_package().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
