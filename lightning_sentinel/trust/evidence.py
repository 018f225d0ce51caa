"""The evidence of a ban: what was signed by whom, so that anybody can see later and elsewhere why a worker was banned.

Where workers sign, nothing in it has to be believed: what is not signed itself is bound by something that is. A vote signs the
digest of the recomputation behind it, the number of workers that could vote, and the digest of what it is about. Reason and step
follow from the statements. Where nobody signs, and of a ban by flags, it is a record and no proof, and says so.

How it is kept: :mod:`lightning_sentinel.trust.evidence_files`; how it is verified: :mod:`lightning_sentinel.trust.verify_evidence`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of
from lightning_sentinel.trust.fields import LARGEST_REAL
from lightning_sentinel.trust.identity import PublicKey
from lightning_sentinel.trust.records import FlagRecord
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import ContributionVote, RowStatement, SignalStatement, VoteStatement

__all__ = ["LIED", "MATCHES", "OUTCOMES", "Ballot", "Evidence", "Message", "Reason", "Recomputation", "Testimony", "finding_of"]

OUTCOMES = ("matches", "lied", "activation withheld", "gradient withheld", "disputed", "signal withheld")
"""Names of the outcomes of an audit by number, those of :class:`~lightning_sentinel.verification.audit.Outcome`."""

MATCHES = 0
LIED = 1

Message = Signed[SignalStatement] | Signed[RowStatement]
Ballot = Signed[VoteStatement] | Signed[ContributionVote]


class Reason(str, Enum):
    """Why a worker was banned."""

    LIED = "lied"
    """Most workers of its stage recomputed a signal that it had signed, and found another."""
    CONTRADICTED_ITSELF = "contradicted itself"
    """It signed two different statements about the same thing."""
    WITHHELD = "withheld"
    """It gave auditors another signal than it had sent, or received, by its own signed word."""
    FALSE_WORD = "false word"
    """As an auditor it signed the opposite of what most workers of its stage found."""
    CONTRIBUTION = "false weight gradients"
    """Most workers of its stage recomputed what it adds to the weight gradients, and found something else than it had published."""
    ROW = "false row"
    """Most workers of its stage measured a signal that it had received, and found something else than its row says."""
    NOTE = "false note"
    """Most workers of the next stage compared its note with the signal that it is about, and found another."""
    CONTRADICTED_OTHERS = "contradicted others"
    """About messages between them it said something else than more workers of one stage than can be malicious there."""
    FORGED = "forged signature"
    """It gave its row, or the messages that it names in its row, a signature that is not its own."""
    SEAL = "did not open its seal"
    """It showed no seal of what it had drawn for audits, or did not open it. Nobody signs what is shown, so it is a record."""
    FLAGGED = "flagged"
    """By flags alone, which nobody recomputed."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Recomputation:
    """What an auditor or a juror found when it recomputed a signal, or the sketch of a contribution to weight gradients.

    Args:
        recomputed: digest of its own result.
        error: relative error of what was audited to that.
        tolerance: up to which error it matches.

    Example:
        >>> found = Recomputation(digest_of(b"a signal", Algorithm.SHA256), error=0.8, tolerance=1e-3)
        >>> finding_of(found, Algorithm.SHA256) == finding_of(found, Algorithm.SHA256)
        True
    """

    recomputed: Digest
    error: float
    tolerance: float

    @property
    def is_sensible(self) -> bool:
        """Whether error and tolerance are numbers that can have been measured; those of somebody else may be anything."""
        error = self.error == math.inf or 0 <= self.error < LARGEST_REAL
        return error and 0 <= self.tolerance < LARGEST_REAL

    def encode(self) -> bytes:
        """Its one encoding: 8 bytes that name it and its version, error and tolerance (8 bytes each), and the digest."""
        return struct.pack(">8sdd", b"sentrec\x01", self.error, self.tolerance) + self.recomputed.encode()


def finding_of(recomputation: Recomputation | None, algorithm: Algorithm) -> Digest:
    """The digest of what was found, which a vote signs; of nothing, if the signal could not be recomputed.

    Args:
        recomputation: what was found.
        algorithm: how to make the digest.
    """
    return digest_of(b"" if recomputation is None else recomputation.encode(), algorithm)


@dataclass(frozen=True)
class Testimony:
    """A vote, and what it rests on.

    Args:
        vote: signed by the auditor or juror.
        recomputation: what it found; ``None`` if it could not recompute it.
    """

    # Its name begins as those of test classes do.
    __test__ = False

    vote: Ballot
    recomputation: Recomputation | None


@dataclass(frozen=True)
class Evidence:
    """Why a worker was banned.

    Args:
        banned: the worker.
        reason: why.
        step: of the latest statement in it, or of the latest step of the record.
        keys: the public keys of the banned worker, of all live replicas of its stage, and of whoever else signed something in it;
            empty where nobody signs.
        messages: signals and rows that matter. A worker that lied signed at least one of them, and one that contradicted itself
            two that contradict each other; about a false word, the signals that it was about.
        testimonies: all votes on these signals, or on contributions in these rows.
        contents: of some of these rows.
        record: of a ban by flags; else ``None``.
    """

    banned: Worker
    reason: Reason
    step: int
    keys: Mapping[Worker, PublicKey]
    messages: tuple[Message, ...]
    testimonies: tuple[Testimony, ...]
    contents: tuple[bytes, ...] = ()
    record: FlagRecord | None = None
