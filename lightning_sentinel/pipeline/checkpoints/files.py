"""Writes checkpoint files atomically: a file is complete or not there.

Lightning's own plugin writes to the directory of temporary files and moves the file. If that is another file system the move is a
copy, and a killed process or a full disk leaves half a file where the previous checkpoint was.
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
    """Replaces a checkpoint atomically, and reports incomplete files.

    Files are written beside their target as ``.<name>.part``; the next save overwrites a part that a killed process left behind.
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
            OSError: if the file could not be written, with the target's path; the previous file is untouched.
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
            ConfigurationError: if the file is incomplete, or no checkpoint.
            FileNotFoundError: if there is no file.
        """
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            with get_filesystem(path).open(path, "rb") as file:
                # A zip archive's directory is at its end, so a truncated file is no zip file.
                if zipfile.is_zipfile(file):
                    raise
            raise ConfigurationError(
                f"{path} is not a whole checkpoint, but one that was cut off while it was written or copied, or another kind of"
                f" file: it cannot be read ({type(error).__name__}: {error}). Use an earlier one; this one was left as it is."
            ) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or a sharded checkpoint; if the process is killed meanwhile, nothing left looks like a checkpoint."""
        target = local_path(path)
        if target is None or target.is_symlink() or not target.is_dir():
            super().remove_checkpoint(path)
            return
        part = part_of(target)
        clear(part)
        target.rename(part)
        shutil.rmtree(part)


def local_path(path: str | Path) -> Path | None:
    """The path in the local file system; ``None`` for a remote path."""
    name = str(path).removeprefix("file://")
    return None if "://" in name else Path(name)


def part_of(target: Path) -> Path:
    """The temporary path at which a checkpoint is written before it is moved to its target."""
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
    """The operating system's error behind an error, if there is one; torch's archive writer may raise its own on top."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, if the operating system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def aside(target: Path) -> Iterator[None]:
    """Move a checkpoint aside while one of another kind, which cannot replace it atomically, is written; on failure move it back.

    Raises:
        ConfigurationError: if the target is a directory but no checkpoint.
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
    """Raise ``ConfigurationError`` if a file's content is no Lightning checkpoint."""
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
