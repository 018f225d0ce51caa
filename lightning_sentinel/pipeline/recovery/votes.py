"""Votes of auditors in bytes: what an auditor found, with its signature.

All ranks gather the votes on all that is audited at once, so each vote has the same length, whatever it is on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from struct import Struct

from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import DIGEST_BYTES, Algorithm, Digest, digest_of
from lightning_sentinel.trust.evidence import Recomputation, Testimony, finding_of
from lightning_sentinel.trust.identity import SIGNATURE_BYTES
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import ContributionVote, Moment, SignalId, VoteStatement
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.tolerance import MEASURED

__all__ = ["VOTE_BYTES", "Vote", "decode", "encode", "lie_of", "of_auditor", "says", "says_of_weights", "sketch_bytes", "testimony"]

_LAYOUT = Struct(f">B{MEASURED}fdd{DIGEST_BYTES}s{SIGNATURE_BYTES}s")
VOTE_BYTES = _LAYOUT.size

_NO_DIGEST = bytes(DIGEST_BYTES)
_WORDS = tuple(word for word in Outcome if word is not Outcome.DISPUTED)
"""The votes that one worker can cast."""


@dataclass(frozen=True)
class Vote:
    """An auditor's vote on a signal, or on a contribution to weight gradients.

    Args:
        word: what it says of it.
        measured: how far the signal is from the recomputed one, :data:`MEASURED` numbers; NaN if it was not recomputed.
        recomputation: what the word rests on; ``None`` if nothing was recomputed.
        signature: of the auditor, over the statement from :func:`says` or :func:`says_of_weights`.
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
        if not found.is_sensible:
            return False
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


def lie_of(vote: Vote, said: Outcome, algorithm: Algorithm) -> Vote:
    """The vote of a worker that says something in place of its own word, with what that would follow from.

    Args:
        vote: what it found.
        said: what it says; where that is its own word the vote is as it was.
        algorithm: of digests.
    """
    if said == vote.word:
        return vote
    found = vote.recomputation or Recomputation(digest_of(b"", algorithm), 0.0, 0.0)
    return replace(vote, word=said, recomputation=replace(found, error=0.0 if said == Outcome.MATCHES else math.inf))


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


def says_of_weights(
    vote: Vote, auditor: Worker, audited: Worker, sketch: Tensor, moment: Moment, live: int, credentials: Credentials
) -> ContributionVote:
    """What an auditor signs about a contribution to weight gradients.

    Args:
        vote: on the contribution.
        auditor: who casts it.
        audited: whose contribution it is.
        sketch: ``(SKETCHED,)`` on the host, which the audited worker has published in its row.
        moment: of the step.
        live: workers of the stage that are not banned.
        credentials: of the run.
    """
    algorithm = credentials.algorithm
    named = digest_of(sketch_bytes(sketch), algorithm)
    return ContributionVote(moment, auditor, audited, named, vote.word, live, finding_of(vote.recomputation, algorithm))


def sketch_bytes(sketch: Tensor) -> bytes:
    """A sketch as it stands in a row: float32 in the order of memory."""
    return sketch.contiguous().numpy().tobytes()


def of_auditor(everyone: Tensor, rank: int, number: int) -> Vote:
    """The vote of an auditor, from what all ranks gathered: only its own entry counts, whatever other ranks put there.

    Args:
        everyone: ``(ranks, VOTE_BYTES * cases)`` bytes.
        rank: of the auditor.
        number: of the case.
    """
    return decode(everyone[rank, number * VOTE_BYTES : (number + 1) * VOTE_BYTES].numpy().tobytes())


def testimony(vote: Vote, statement: VoteStatement | ContributionVote, credentials: Credentials) -> Testimony | None:
    """The vote as others may be shown it later; ``None`` if the auditor had to sign it, and has not.

    Args:
        vote: as it came.
        statement: from :func:`says` or :func:`says_of_weights`.
        credentials: with the auditor's key.
    """
    signature = vote.signature if credentials.keys else bytes(SIGNATURE_BYTES)
    if isinstance(statement, ContributionVote):
        of_weights = Signed(statement, signature)
        return Testimony(of_weights, vote.recomputation) if credentials.hold(of_weights) else None
    signed = Signed(statement, signature)
    return Testimony(signed, vote.recomputation) if credentials.hold(signed) else None
