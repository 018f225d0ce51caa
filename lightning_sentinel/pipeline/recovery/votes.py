"""Votes of auditors in bytes: what an auditor found, with its signature.

All ranks gather the votes on all audited signals at once, so each vote has the same length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import DIGEST_BYTES, Algorithm, Digest
from lightning_sentinel.trust.evidence import Recomputation, Testimony, finding_of
from lightning_sentinel.trust.identity import SIGNATURE_BYTES
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Moment, SignalId, VoteStatement
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.tolerance import MEASURED

__all__ = ["VOTE_BYTES", "Vote", "decode", "encode", "says", "testimony"]

_LAYOUT = Struct(f">B{MEASURED}fdd{DIGEST_BYTES}s{SIGNATURE_BYTES}s")
VOTE_BYTES = _LAYOUT.size

_NO_DIGEST = bytes(DIGEST_BYTES)
_WORDS = tuple(word for word in Outcome if word is not Outcome.DISPUTED)
"""The votes that one worker can cast."""


@dataclass(frozen=True)
class Vote:
    """An auditor's vote on a signal.

    Args:
        word: what it says of the signal.
        measured: how far the signal is from the recomputed one, :data:`MEASURED` numbers; NaN if it was not recomputed.
        recomputation: what the word rests on; ``None`` if the signal was not recomputed.
        signature: of the auditor, over the statement from :func:`says`.
    """

    word: Outcome
    measured: Sequence[float] = (math.nan,) * MEASURED
    recomputation: Recomputation | None = None
    signature: bytes = bytes(SIGNATURE_BYTES)

    @property
    def follows(self) -> bool:
        """Whether the word follows from the recomputation, if one of the two has to do with the other."""
        found = self.recomputation
        if self.word not in (Outcome.MATCHES, Outcome.LIED):
            return True
        if found is None:
            return self.word == Outcome.MATCHES
        return (self.word == Outcome.LIED) == (not found.error <= found.tolerance)


def encode(vote: Vote) -> bytes:
    """The vote, in :data:`VOTE_BYTES` bytes."""
    found = vote.recomputation
    numbers = (0.0, 0.0, _NO_DIGEST) if found is None else (found.error, found.tolerance, found.recomputed.encode())
    return _LAYOUT.pack(vote.word, *vote.measured, *numbers, vote.signature)


def decode(encoded: bytes) -> Vote:
    """The vote that bytes are: any bytes at all, of the right number. Who says nothing sensible says that the signal matches."""
    word, *rest = _LAYOUT.unpack(encoded)
    *measured, error, tolerance, digest, signature = rest
    recomputation = None
    with suppress(MalformedMessageError):
        recomputation = Recomputation(Digest.decode(digest), error, tolerance)
    vote = Vote(Outcome(word) if word in _WORDS else Outcome.MATCHES, measured, recomputation, signature)
    return vote if vote.follows else Vote(Outcome.MATCHES)


def says(
    vote: Vote, auditor: Worker, moment: Moment, signal: SignalId, about: Digest, live: int, algorithm: Algorithm
) -> VoteStatement:
    """What an auditor signs.

    Args:
        vote: on a message, or on a row.
        auditor: who casts it.
        moment: of the step.
        signal: the message, or the signal that the row is about.
        about: digest of what the sender has signed about the message, or of the row.
        live: workers of the stage that are not banned.
        algorithm: of the run's digests.
    """
    return VoteStatement(moment, auditor, signal, about, vote.word, live, finding_of(vote.recomputation, algorithm))


def testimony(vote: Vote, statement: VoteStatement, credentials: Credentials) -> Testimony | None:
    """The vote as others may be shown it later; ``None`` if it is not signed by the auditor.

    Args:
        vote: as it came.
        statement: from :func:`says`.
        credentials: with the auditor's key.
    """
    signed = Signed(statement, vote.signature)
    return Testimony(signed, vote.recomputation) if credentials.keys and credentials.hold(signed) else None
