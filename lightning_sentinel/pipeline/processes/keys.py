"""The keys of a run's workers, told while the processes meet: each proves that it has the private half of the key that it names.

A worker's rank and machine are what it says of itself. With a key a ban follows the worker, and a list of known workers admits
nobody else.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection

import torch

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.pipeline.processes.wire import Wire
from lightning_sentinel.trust.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PublicKey
from lightning_sentinel.trust.known_workers import require_distinct, require_known

__all__ = ["exchange_keys"]

_NONCE_BYTES = 16
_NONE = bytes(KEY_BYTES + SIGNATURE_BYTES)
"""What a rank without a key says."""


def exchange_keys(wire: Wire, identity: Identity | None, known: Collection[PublicKey] | None) -> tuple[PublicKey, ...]:
    """Tell all ranks this rank's key, and learn theirs; to be called by all ranks, those without a key too.

    Args:
        wire: of all ranks.
        identity: of this rank; ``None`` if it has no key.
        known: keys that are admitted; ``None`` admits any.

    Returns:
        the keys by rank; none if no rank has one.

    Raises:
        ConfigurationError: if some ranks have a key and others none, if two have the same, or if one is not known.
        MalformedMessageError: if a rank does not prove that a key is its own.
    """
    # A new question in each run, so that what a worker has answered in another one proves nothing.
    nonce = wire.broadcast_bytes(secrets.token_bytes(_NONCE_BYTES), wire.ranks[0], _NONCE_BYTES, "a nonce")
    mine = _NONE if identity is None else identity.public.raw + identity.sign(_question(nonce, wire.rank))
    said = wire.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    answers = [row.numpy().tobytes() for row in said]
    without = [rank for rank, answer in zip(wire.ranks, answers) if answer == _NONE]
    if len(without) == wire.size:
        return ()
    if without:
        raise ConfigurationError(
            f"Rank(s) {', '.join(map(str, without))} have no key, and the others have. Give SentinelStrategy(identity=...) on every"
            " machine, or on none."
        )
    keys = tuple(_proven(answer, nonce, rank) for rank, answer in zip(wire.ranks, answers))
    require_distinct(keys)
    if known is not None:
        require_known(keys, known)
    return keys


def _question(nonce: bytes, rank: int) -> bytes:
    return b"lightning-sentinel key/" + nonce + rank.to_bytes(4, "little")


def _proven(answer: bytes, nonce: bytes, rank: int) -> PublicKey:
    key = PublicKey(answer[:KEY_BYTES])
    if not key.verifies(answer[KEY_BYTES:], _question(nonce, rank)):
        raise MalformedMessageError(
            f"Rank {rank} names the key {key} and does not prove that it is its own: the signature does not verify. Leave its"
            " machine out, or give it a key file of its own.",
            rank=rank,
        )
    return key
