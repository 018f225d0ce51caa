"""Text that every machine has, as bytes: Python's own sources, and the prose of its manual."""

from __future__ import annotations

import functools
import importlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.seeds import derive_seed

__all__ = ["VOCABULARY", "Corpus", "corpus"]

VOCABULARY = 256
_CODE_BYTES = 2_000_000
_BLOCK = 4096
_HELD_OUT_EVERY = 20
_VALIDATION_WINDOWS = 512
# Not the language that people write: installed packages, tables, and tests that are mostly odd literals.
_SKIPPED = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idlelib"})


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text, of which every twentieth block is held out.

    Args:
        training: uint8 of shape ``(N,)``.
        held_out: uint8 of shape ``(M,)``.
    """

    training: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, text: bytes) -> Corpus:
        """Split a text. Held-out blocks lie all over it, so that both parts are of a kind.

        Example:
            >>> split = Corpus.of(bytes(80) * 4096)
            >>> len(split.training) // 4096, len(split.held_out) // 4096
            (76, 4)
        """
        blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).split(_BLOCK)
        held_out = [block for number, block in enumerate(blocks) if number % _HELD_OUT_EVERY == 0]
        training = [block for number, block in enumerate(blocks) if number % _HELD_OUT_EVERY]
        return cls(torch.cat(training), torch.cat(held_out))

    def batch(self, size: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The windows of one step and the same one byte later, int64 ``(size, length)`` each.

        A function of its arguments alone, so that a run that goes on from a checkpoint sees what it would have seen.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, "batch", step))
        starts = torch.randint(len(self.training) - length, (size,), generator=generator)
        return _windows(self.training, starts, length)

    def validation(self, length: int) -> tuple[Tensor, Tensor]:
        """The same windows for every run, ``(512, length)`` each."""
        return _windows(self.held_out, torch.linspace(0, len(self.held_out) - length - 1, _VALIDATION_WINDOWS).long(), length)


def _windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(length + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@functools.cache
def corpus(name: str) -> Corpus:
    """``"code"``, the sources of Python's standard library, or ``"prose"``, the English of its manual.

    Raises:
        ConfigurationError: if this Python came without them.
    """
    return Corpus.of(_code() if name == "code" else _prose())


def _code() -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts)):
        text += path.read_bytes() + b"\n"
        if len(text) >= _CODE_BYTES:
            break
    return _long_enough(bytes(text[:_CODE_BYTES]), "code", f"the sources of the standard library in {root}")


def _prose() -> bytes:
    try:
        # Some distributions leave it out.
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    text = "\n".join(topics[name] for name in sorted(topics))
    return _long_enough(text.encode(), "prose", "the topics of its help(), pydoc_data.topics")


def _long_enough(text: bytes, name: str, source: str) -> bytes:
    if len(text) < 50 * _BLOCK:
        raise ConfigurationError(
            f"data={name!r} cannot be had: this Python came without {source}, which it is made of. Use another --data, or a Python"
            " that was installed in full."
        )
    return text
