"""Checkpoint files that are whole or not there.

Lightning's own plugin collects a file in the directory of temporary files and moves it. Where that is another file system the move
is a copy, and a process that is killed meanwhile, or a disk that is full, leaves half a file where the previous checkpoint was.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError

__all__ = ["AtomicCheckpointIO"]


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
        name = str(path).removeprefix("file://")
        if storage_options is not None or "://" in name:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Not straight into the file: torch does not say which error of the system its archive failed with.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        target = Path(name)
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                # Or after a loss of power there could be an empty file under the new name.
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(target)) from error

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
                f"{path} is not a whole checkpoint, but one that was cut off while it was written or copied: it cannot be read"
                f" ({type(error).__name__}: {error}). Use an earlier one; this one was left as it is."
            ) from error
