"""Digests: short names of contents, which nobody can give to other contents.

BLAKE3 takes a quarter of the time of SHA-256 and needs the package ``blake3``. All ranks use the same of the two, so that equal
contents have equal digests; a digest says which of them made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError

__all__ = ["DIGEST_BYTES", "Algorithm", "Digest", "agreed_algorithm", "available_algorithms", "digest_of", "digest_of_tensor"]

_VALUE_BYTES = 32
DIGEST_BYTES = 1 + _VALUE_BYTES
"""Length of an encoded digest: its algorithm, and its value."""


class Algorithm(IntEnum):
    """How a digest is made, the better one with the higher number. The number is part of what is signed: append only."""

    SHA256 = 1
    BLAKE3 = 2


@dataclass(frozen=True)
class Digest:
    """A digest, and how it was made.

    Args:
        algorithm: with which it was made.
        value: 32 bytes.

    Raises:
        MalformedMessageError: if these are not 32 bytes.

    Example:
        >>> digest = digest_of(b"abc", Algorithm.SHA256)
        >>> print(digest)
        sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad
        >>> digest.names(b"abc"), digest.names(b"abd"), Digest.decode(digest.encode()) == digest
        (True, False, True)
    """

    algorithm: Algorithm
    value: bytes

    def __post_init__(self) -> None:
        if len(self.value) != _VALUE_BYTES:
            raise MalformedMessageError(f"A digest of {len(self.value)} bytes came, and each has {_VALUE_BYTES}.")

    def encode(self) -> bytes:
        """The digest in ``DIGEST_BYTES`` bytes."""
        return bytes([self.algorithm]) + self.value

    @classmethod
    def decode(cls, encoded: bytes) -> Digest:
        """The digest that these bytes are.

        Raises:
            MalformedMessageError: if they are none; nothing else is ever raised.
        """
        if encoded[:1] not in (bytes([algorithm]) for algorithm in Algorithm):
            raise MalformedMessageError(
                f"A digest came whose first byte is {encoded[:1].hex() or 'missing'}, which names no algorithm. All ranks must run"
                " the same version of lightning-sentinel."
            )
        return cls(Algorithm(encoded[0]), encoded[1:])

    def names(self, contents: bytes | Tensor) -> bool:
        """Whether this is the digest of the contents, whatever algorithm is used elsewhere.

        Raises:
            ConfigurationError: if it was made with BLAKE3, and the package ``blake3`` is not installed.
        """
        made = digest_of_tensor(contents, self.algorithm) if isinstance(contents, Tensor) else digest_of(contents, self.algorithm)
        return made == self

    def __str__(self) -> str:
        return f"{self.algorithm.name.lower()}:{self.value.hex()}"


@cache
def available_algorithms() -> tuple[Algorithm, ...]:
    """The algorithms that this machine has, in ascending order; SHA-256 is everywhere."""
    try:
        import blake3  # noqa: F401
    except ImportError:
        return (Algorithm.SHA256,)
    return (Algorithm.SHA256, Algorithm.BLAKE3)


def agreed_algorithm(of_ranks: Sequence[Collection[int]]) -> Algorithm:
    """The best algorithm that all ranks have, the same on each of them.

    Args:
        of_ranks: the numbers of each rank's algorithms, as the ranks exchanged them. Numbers that this version does not know are
            passed over, and so is whether a rank says that it has SHA-256, which is part of Python.

    Example:
        >>> agreed_algorithm([(1, 2), (1, 2, 77)]).name, agreed_algorithm([(1, 2), (1,)]).name
        ('BLAKE3', 'SHA256')
    """
    return max((one for one in Algorithm if all(one in has for has in of_ranks)), default=Algorithm.SHA256)


def digest_of(contents: bytes, algorithm: Algorithm) -> Digest:
    """The digest of bytes.

    Raises:
        ConfigurationError: if ``algorithm`` is BLAKE3, and the package ``blake3`` is not installed.

    Example:
        >>> digest_of(b"abc", Algorithm.SHA256).value.hex()[:8]
        'ba7816bf'
    """
    hasher = _hasher(algorithm)
    hasher.update(contents)
    return Digest(algorithm, hasher.digest())


def digest_of_tensor(tensor: Tensor, algorithm: Algorithm) -> Digest:
    """The digest of a tensor: of the text ``dtype:size,size,...`` and a line feed, and of its elements' bytes after that.

    Tensors of the same bytes and another shape or dtype have other digests, and so have zeros of another sign. Strides and device
    do not matter.

    Args:
        tensor: any shape and dtype, on any device; elements that are not contiguous or not on the host are copied.
        algorithm: how to make the digest.

    Raises:
        ConfigurationError: if ``algorithm`` is BLAKE3, and the package ``blake3`` is not installed.

    Example:
        >>> signal = torch.arange(6.0).reshape(2, 3)
        >>> digest_of_tensor(signal, Algorithm.SHA256) == digest_of_tensor(signal.T.contiguous().T, Algorithm.SHA256)
        True
        >>> digest_of_tensor(signal, Algorithm.SHA256) == digest_of_tensor(signal.reshape(3, 2), Algorithm.SHA256)
        False
    """
    hasher = _hasher(algorithm)
    name = str(tensor.dtype).removeprefix("torch.")
    hasher.update(f"{name}:{','.join(map(str, tensor.shape))}\n".encode())
    # A tensor without axes cannot be seen as bytes, and NumPy has no bfloat16.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy())
    return Digest(algorithm, hasher.digest())


def _hasher(algorithm: Algorithm) -> Any:
    """A hash object as in ``hashlib``, which the package ``blake3`` imitates."""
    if algorithm is Algorithm.SHA256:
        return hashlib.sha256()
    try:
        from blake3 import blake3
    except ImportError:
        raise ConfigurationError(
            "A digest was made with BLAKE3, which is not installed on this machine. Install it with: pip install blake3. Ranks that"
            " agree on an algorithm use SHA-256 where one of them lacks it."
        ) from None
    return blake3()
