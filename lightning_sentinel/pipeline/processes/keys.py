"""The keys of a run's workers, told while the processes meet: each proves that it has the private half of the key that it names.

A worker's rank and machine are what it says of itself. With a key a ban follows the worker, and a list of known workers admits
nobody else.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

import torch

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.processes.wire import Wire
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Algorithm, agreed_algorithm, available_algorithms
from lightning_sentinel.trust.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PublicKey
from lightning_sentinel.trust.known_workers import require_distinct, require_known
from lightning_sentinel.trust.statements import RUN_BYTES

__all__ = ["exchange_keys", "make_credentials"]

_NONCE_BYTES = 16
_NONE = bytes(KEY_BYTES + SIGNATURE_BYTES + 1)
"""What a rank without a key says."""


def exchange_keys(
    wire: Wire, identity: Identity | None, known: Collection[PublicKey] | None, kept: bool = True
) -> tuple[PublicKey, ...]:
    """Tell all ranks this rank's key, and learn theirs; to be called by all ranks, those without a key too.

    Args:
        wire: of all ranks.
        identity: of this rank; ``None`` if it has no key.
        known: keys that are admitted; ``None`` admits any.
        kept: whether this rank's key is one that it has in other runs as well.

    Returns:
        the keys by rank; none if no rank has one.

    Raises:
        ConfigurationError: if some ranks have a key and others none, or one of this run only, if two have the same, or if one is
            not known.
        MalformedMessageError: if a rank does not prove that a key is its own.
    """
    # A new question in each run, so that what a worker has answered in another one proves nothing.
    nonce = wire.broadcast_bytes(secrets.token_bytes(_NONCE_BYTES), wire.ranks[0], _NONCE_BYTES, "a nonce")
    mine = _NONE if identity is None else identity.public.raw + identity.sign(_question(nonce, wire.rank)) + bytes([kept])
    said = wire.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    answers = [row.numpy().tobytes() for row in said]
    without = [rank for rank, answer in zip(wire.ranks, answers) if answer == _NONE]
    if len(without) == wire.size:
        return ()
    drawn = [rank for rank, answer in zip(wire.ranks, answers) if not answer[-1]]
    for ranks, what in ((without, "no key"), (drawn, "no key that is kept")):
        if 0 < len(ranks) < wire.size:
            raise ConfigurationError(
                f"Rank(s) {', '.join(map(str, ranks))} have {what}, and the others have. Give the same"
                " SentinelStrategy(identity=...) on every machine, or leave it out on all."
            )
    keys = tuple(_proven(answer, nonce, rank) for rank, answer in zip(wire.ranks, answers))
    require_distinct(keys)
    if known is not None:
        require_known(keys, known)
    return keys


def make_credentials(wire: Wire, identity: Identity | None, keys: Sequence[PublicKey], workers: Sequence[Worker]) -> Credentials:
    """What this rank signs with from now on; a collective. The run has a new name, so nothing that was signed before counts.

    Args:
        wire: of all ranks.
        identity: of this rank; ``None`` if nothing is signed.
        keys: of all ranks, from :func:`exchange_keys`; none if nothing is signed.
        workers: that the ranks are.
    """
    run = wire.broadcast_bytes(secrets.token_bytes(RUN_BYTES), wire.ranks[0], RUN_BYTES, "the name of a run")
    mine = torch.tensor([algorithm in available_algorithms() for algorithm in Algorithm])
    has = [[algorithm for algorithm, there in zip(Algorithm, row) if there] for row in wire.all_gather(mine).tolist()]
    return Credentials(run, agreed_algorithm(has), identity if keys else None, dict(zip(workers, keys)))


def _question(nonce: bytes, rank: int) -> bytes:
    return b"lightning-sentinel key/" + nonce + rank.to_bytes(4, "little")


def _proven(answer: bytes, nonce: bytes, rank: int) -> PublicKey:
    key = PublicKey(answer[:KEY_BYTES])
    if not key.verifies(answer[KEY_BYTES:-1], _question(nonce, rank)):
        raise MalformedMessageError(
            f"Rank {rank} names the key {key} and does not prove that it is its own: the signature does not verify. Leave its"
            " machine out, or give it a key file of its own.",
            rank=rank,
        )
    return key
