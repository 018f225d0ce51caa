"""Sharded checkpoints: every stage writes its own part.

``name.ckpt`` is a directory. ``stage-S-ID.pt`` has the weights, buffers and optimizer state of stage ``S``; ``checkpoint.pt``, the
index, is written last, has the rest, and lists the parts that belong to it. All files are in torch's format and read with
``weights_only=True``. A save that replaces another writes its parts beside the old ones; it takes effect when it replaces
``checkpoint.pt``.

``torch.distributed.checkpoint`` would do the same, but for two things: it unpickles its metadata without a check, and a save into
an existing directory overwrites the old files one by one.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.checkpoints.files import INDEX, aside, clear, part_of, sync_folder, write_file
from lightning_sentinel.pipeline.checkpoints.full import SECTION, StageState, merge_optimizer_states, optimizer_of

__all__ = ["Destination", "ShardedCheckpoint", "consolidate"]

_FORMAT = 1
_PARTS = "sharded"
"""Key, in our section of the checkpoint, of the description of the parts."""


class Destination(NamedTuple):
    """Where a save is written.

    Args:
        target: path of the checkpoint.
        folder: where its files are written: the target, if that is a sharded checkpoint already, else a directory beside it.
        save: id of this save, in the names of all its parts.
    """

    target: str
    folder: str
    save: str

    @classmethod
    def prepare(cls, target: Path) -> Destination:
        """Choose the folder and make it, without files that a killed process left there; to be called on one rank."""
        folder = target if (target / INDEX).is_file() else part_of(target)
        if folder != target:
            clear(folder)
            folder.mkdir(parents=True)
        return cls(str(target), str(folder), uuid.uuid4().hex[:12])

    def write_part(
        self, stage: int, states: Mapping[str, Mapping[str, Tensor]], optimizers: Sequence[StageState]
    ) -> dict[str, Any]:
        """Write the part of one stage.

        Args:
            stage: number of the stage.
            states: the stage's entries of the module's ``state_dict``, and of other dicts in the checkpoint with the same keys.
            optimizers: the stage's part of each optimizer; see :func:`lightning_sentinel.pipeline.checkpoints.full.optimizer_part`.

        Returns:
            a description of the part for the index.

        Raises:
            OSError: if the part could not be written.
        """
        name = self._file(stage)
        content = {
            "save": self.save,
            "states": {key: _on_host(state) for key, state in states.items()},
            "optimizers": [{"plain": plain, "tensors": _on_host(tensors)} for plain, tensors in optimizers],
        }
        size = write_file(content, Path(self.folder) / name)
        parameters = sorted({name for plain, _ in optimizers for group in plain["groups"] for name in group})
        return {"file": name, "bytes": size, "state_names": list(states["state_dict"]), "parameter_names": parameters}

    def believed(self, stage: int, described: Mapping[str, Any], speaks_for: Callable[[str], bool]) -> dict[str, Any]:
        """Check a stage's description of its part, and drop names that are not the stage's own.

        Args:
            stage: number of the stage.
            described: the description that the stage sent, which should be the result of :meth:`write_part`.
            speaks_for: whether an entry of the module's ``state_dict`` is this stage's.

        Raises:
            ConfigurationError: if the description is invalid.
        """
        names = [described.get("state_names"), described.get("parameter_names")]
        listed = all(isinstance(found, list) and all(isinstance(name, str) for name in found) for found in names)
        file = described.get("file")
        size = described.get("bytes")
        if file != self._file(stage) or type(size) is not int or not listed:
            raise ConfigurationError(
                f"What stage {stage} says that it has written is no part of this checkpoint: {str(dict(described))[:120]}. Its part"
                f" is {self._file(stage)}. The save was given up; look after the machine that serves the stage."
            )
        states, parameters = ([name for name in found or () if speaks_for(name)] for found in names)
        return {"file": file, "bytes": size, "state_names": states, "parameter_names": parameters}

    def _file(self, stage: int) -> str:
        return f"stage-{stage}-{self.save}.pt"

    def publish(self, checkpoint: dict[str, Any], parts: Sequence[Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        """Write the index and remove the save that this one replaces; to be called on one rank, once all parts are written.

        Args:
            checkpoint: Lightning's checkpoint, without the entries that are in the parts.
            parts: the description of each stage's part, from :meth:`write_part`.
            index: data for consolidation: ``state_names`` and ``parameter_names`` of the unsplit module, in order, and the
                ``options`` of each optimizer's groups.

        Raises:
            ConfigurationError: if this rank cannot see a part.
            OSError: if the index could not be written.
        """
        folder = Path(self.folder)
        target = Path(self.target)
        for part in parts:
            file = folder / part["file"]
            if not file.is_file() or file.stat().st_size != part["bytes"]:
                raise ConfigurationError(
                    f"{file}, which another process wrote, is not to be seen from rank zero. A sharded checkpoint needs a path that"
                    " all machines share; use one, or SentinelStrategy(state_dict_type='full')."
                )
        described = {"format": _FORMAT, "save": self.save, "parts": [dict(part) for part in parts], **index}
        section = {**checkpoint.get(SECTION, {}), _PARTS: described}
        write_file({**checkpoint, SECTION: section}, folder / INDEX)
        if folder != target:
            self._move(folder, target)
        kept = {INDEX, *(part["file"] for part in parts)}
        for pattern in ("stage-*.pt", ".*.part"):
            for file in target.glob(pattern):
                if file.name not in kept:
                    file.unlink()

    @staticmethod
    def _move(folder: Path, target: Path) -> None:
        if target.exists():
            with aside(target):
                folder.rename(target)
        else:
            folder.rename(target)
        sync_folder(target.parent)

    def abandon(self) -> None:
        """Remove the files of a save that failed; the previous checkpoint stays."""
        if self.folder != self.target:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for file in Path(self.folder).glob(f"*{self.save}*"):
            file.unlink(missing_ok=True)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    on_host = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    # torch.save writes the whole storage of a view, so views are cloned.
    return {name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in on_host.items()}


class ShardedCheckpoint:
    """Reads a sharded checkpoint. Tensors are memory-mapped, so that only those asked for are read.

    Args:
        path: the directory.
        weights_only: whether only tensors and plain values are read from the index; from the parts only these are ever read.

    Raises:
        ConfigurationError: if the directory is no sharded checkpoint, or incomplete.
    """

    def __init__(self, path: str | Path, weights_only: bool = True) -> None:
        self.path = Path(path)
        self.checkpoint = self._index(weights_only)
        described = self.checkpoint[SECTION].pop(_PARTS)
        self.state_names: list[str] = described["state_names"]
        self._parameter_names: list[str] = described["parameter_names"]
        self._options: list[list[dict[str, Any]]] = described["options"]
        self._parts = described["parts"]
        self._save = described["save"]
        for part in self._parts:
            if Path(part["file"]).name != part["file"]:
                raise ConfigurationError(f"{self.path / INDEX} names {part['file']!r} as a part, which is not in its directory.")
            file = self.path / part["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != part["bytes"]:
                what = "is missing" if size is None else f"has {size} bytes instead of {part['bytes']}"
                raise ConfigurationError(
                    f"{self.path} is not a whole checkpoint: its part {part['file']} {what}. Copy the directory as a whole, or use"
                    " an earlier one; this one was left as it is."
                )

    @property
    def has_optimizer(self) -> bool:
        """Whether the checkpoint has optimizer states."""
        return bool(self._options)

    def states(self, names: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """The named entries of ``state_dict`` and of other dicts with its keys, in the order of the unsplit module."""
        found: dict[str, dict[str, Tensor]] = {"state_dict": {}}
        for part in self._parts:
            if wanted := [name for name in part["state_names"] if name in names]:
                for key, saved in self._read(part)["states"].items():
                    found.setdefault(key, {}).update({name: saved[name] for name in wanted})
        return {key: {name: state[name] for name in self.state_names if name in state} for key, state in found.items()}

    def optimizer_states(self, parameters: Collection[str]) -> tuple[list[dict[str, Any]], list[list[str]]]:
        """Each optimizer's state of these parameters, in torch's format, and the last optimizer's parameter names by group."""
        parts = [part for part in self._parts if not set(part["parameter_names"]).isdisjoint(parameters)]
        read = [self._read(part)["optimizers"] for part in parts]
        states: list[dict[str, Any]] = []
        groups: list[list[str]] = []
        for index, options in enumerate(self._options):
            chosen = [optimizer_of((one[index]["plain"], one[index]["tensors"]), parameters) for one in read]
            state, groups = merge_optimizer_states(chosen, options, self._parameter_names)
            states.append(state)
        return states, groups

    def whole(self) -> dict[str, Any]:
        """Merge the parts into an ordinary checkpoint."""
        checkpoint = {**self.checkpoint, **self.states(set(self.state_names))}
        if self.has_optimizer:
            names = frozenset(self._parameter_names)
            checkpoint["optimizer_states"], groups = self.optimizer_states(names)
            checkpoint[SECTION] = {**checkpoint[SECTION], "optimizer_groups": groups}
        return checkpoint

    def _index(self, weights_only: bool) -> dict[str, Any]:
        file = self.path / INDEX
        if not file.is_file():
            raise ConfigurationError(
                f"{self.path} is a directory, but no sharded checkpoint: there is no {INDEX} in it. A sharded checkpoint is the"
                " directory that SentinelStrategy(state_dict_type='sharded') saved; name that one, not the one above it."
            )
        content = self._load(file, weights_only)
        described = content.get(SECTION, {}).get(_PARTS, {}) if isinstance(content, dict) else {}
        if described.get("format") != _FORMAT:
            raise ConfigurationError(
                f"{file} is not the index of a sharded checkpoint of format {_FORMAT}, but of {described.get('format')}. Read it"
                " with the version of lightning-sentinel that wrote it."
            )
        return content

    def _read(self, part: Mapping[str, Any]) -> dict[str, Any]:
        content = self._load(self.path / part["file"])
        if content.get("save") != self._save:
            raise ConfigurationError(f"{self.path / part['file']} belongs to another checkpoint than {INDEX} beside it.")
        return content

    @staticmethod
    def _load(file: Path, weights_only: bool = True) -> Any:
        try:
            return torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
        except Exception as error:
            raise ConfigurationError(
                f"{file} cannot be read ({type(error).__name__}: {error}). Use an earlier checkpoint; this one was left as it is."
            ) from error


def consolidate(directory: str | Path, output: str | Path) -> None:
    """Convert a sharded checkpoint into one ordinary Lightning checkpoint, in this process.

    Args:
        directory: the sharded checkpoint.
        output: the file to write, which must not exist.

    Raises:
        ConfigurationError: if ``directory`` is no complete sharded checkpoint, or ``output`` exists.
        OSError: if ``output`` could not be written.
    """
    directory, output = Path(directory), Path(output)
    if output.exists():
        raise ConfigurationError(f"{output} exists, and nothing is overwritten. Name another file, or remove this one.")
    if not directory.is_dir():
        what = "is a file: perhaps it is an ordinary checkpoint already" if directory.exists() else "does not exist"
        raise ConfigurationError(f"{directory} {what}. Name the directory of a sharded checkpoint.")
    write_file(ShardedCheckpoint(directory).whole(), output)
