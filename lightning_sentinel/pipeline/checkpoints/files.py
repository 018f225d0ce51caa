"""Checkpoint files that are whole or not there.

Lightning's own plugin collects a file in the directory of temporary files and moves it. Where that is another file system the move
is a copy, and a process that is killed meanwhile, or a disk that is full, leaves half a file where the previous checkpoint was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError

__all__ = [
    "INDEX",
    "AtomicCheckpointIO",
    "aside",
    "clear",
    "local_path",
    "part_of",
    "require_checkpoint",
    "sync_folder",
    "write_file",
]

INDEX = "checkpoint.pt"
"""The file that makes a directory a sharded checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one go, and says so if a file is only part of one.

    Files are written beside their target as ``.<name>.part``; what a killed process leaves there is written over by the next save.
    Remote paths (``s3://`` and the like) are left to Lightning.

    Example:
        >>> from pathlib import Path
        >>> path = Path(getfixture("tmp_path")) / "run.ckpt"
        >>> AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
        >>> AtomicCheckpointIO().load_checkpoint(path)
        {'step': 3}
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: if it could not be written, with the target's path; whatever was there before is untouched.
            TypeError: if there are ``storage_options``, as in Lightning.
        """
        target = local_path(path)
        if storage_options is not None or target is None:
            super().save_checkpoint(checkpoint, path, storage_options)
        elif target.is_dir():
            # A sharded checkpoint of the same name.
            with aside(target):
                write_file(checkpoint, target)
        else:
            write_file(checkpoint, target)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ConfigurationError: if the file is not a whole checkpoint.
            FileNotFoundError: if there is none.
        """
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            with get_filesystem(path).open(path, "rb") as file:
                # The directory of an archive is at its end, so a part of one has none.
                if zipfile.is_zipfile(file):
                    raise
            raise ConfigurationError(
                f"{path} is not a whole checkpoint, but one that was cut off while it was written or copied, or another kind of"
                f" file: it cannot be read ({type(error).__name__}: {error}). Use an earlier one; this one was left as it is."
            ) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, or a sharded checkpoint; a kill in the middle leaves nothing that looks like a checkpoint."""
        target = local_path(path)
        if target is None or target.is_symlink() or not target.is_dir():
            super().remove_checkpoint(path)
            return
        part = part_of(target)
        clear(part)
        target.rename(part)
        shutil.rmtree(part)


def local_path(path: str | Path) -> Path | None:
    """The path on this machine's disks; ``None`` if it is a remote one."""
    name = str(path).removeprefix("file://")
    return None if "://" in name else Path(name)


def part_of(target: Path) -> Path:
    """Where a checkpoint is collected before it takes its place."""
    return target.with_name(f".{target.name}.part")


def clear(path: Path) -> None:
    """Remove a file or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(content: Any, target: Path) -> int:
    """Write a file in torch's format; it is there when it is whole and on the disk, and not before.

    Returns:
        its size in bytes.

    Raises:
        OSError: if it could not be written, with the target's path; whatever was there before is untouched.
    """
    part = part_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.is_dir():
            clear(part)
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            # Or after a loss of power there could be an empty file under the new name.
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        part.replace(target)
        sync_folder(target.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        cause = _system_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(target)) from error
    return size


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said; torch's archive may put an error of its own over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def aside(target: Path) -> Iterator[None]:
    """Put a checkpoint aside for one of another kind, which cannot replace it in one go; back, if that fails.

    Raises:
        ConfigurationError: if it is no checkpoint, but a directory of the user's.
    """
    if target.is_dir() and not (target / INDEX).is_file():
        raise ConfigurationError(
            f"{target} is a directory and no checkpoint, so it is not replaced by one. Save to another path, or remove it."
        )
    before = target.with_name(f".{target.name}.old")
    clear(before)
    target.rename(before)
    try:
        yield
    except BaseException:
        before.rename(target)
        raise
    clear(before)


def require_checkpoint(content: Any, path: str | Path) -> None:
    """Raise ``ConfigurationError`` unless a file's content is a Lightning checkpoint."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict) and "pytorch-lightning_version" in content:
        return
    what = type(content).__name__
    if isinstance(content, dict):
        keys = ", ".join(map(repr, list(content)[:4]))
        what = f"a dict of {len(content)} entries ({keys}{', ...' if len(content) > 4 else ''})"
    raise ConfigurationError(
        f"{path} can be read, but is no Lightning checkpoint: it is {what}, without a 'state_dict' and the version of Lightning"
        " that wrote it. Pass a file that Trainer.save_checkpoint or ModelCheckpoint wrote, or load weights into the module before"
        " the run."
    )
