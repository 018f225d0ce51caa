"""The evidence of a ban: what was signed by whom, so that anybody can see later and elsewhere why a worker was banned.

Nothing in it has to be believed: what is not signed itself is bound by something that is. A vote signs the digest of the
recomputation behind it, the number of workers that could vote, and the digest of the signal's statement. Reason and step follow
from the statements. How it is kept: :mod:`lightning_sentinel.trust.evidence_files`; how it is verified:
:mod:`lightning_sentinel.trust.verify_evidence`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of
from lightning_sentinel.trust.identity import PublicKey
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import RowStatement, SignalStatement, VoteStatement

__all__ = ["LIED", "MATCHES", "OUTCOMES", "Evidence", "Message", "Reason", "Recomputation", "Testimony", "finding_of"]

OUTCOMES = ("matches", "lied", "activation withheld", "gradient withheld", "disputed", "signal withheld")
"""Names of the outcomes of an audit by number, those of :class:`~lightning_sentinel.verification.audit.Outcome`."""

MATCHES = 0
LIED = 1

Message = Signed[SignalStatement] | Signed[RowStatement]


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

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Recomputation:
    """What an auditor or a juror found when it recomputed a signal.

    Args:
        recomputed: digest of its own result.
        error: relative error of the signal to that.
        tolerance: up to which error a signal matches.

    Example:
        >>> found = Recomputation(digest_of(b"a signal", Algorithm.SHA256), error=0.8, tolerance=1e-3)
        >>> finding_of(found, Algorithm.SHA256) == finding_of(found, Algorithm.SHA256)
        True
    """

    recomputed: Digest
    error: float
    tolerance: float

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
        recomputation: what it found; ``None`` if it could not recompute the signal.
    """

    # Its name begins as those of test classes do.
    __test__ = False

    vote: Signed[VoteStatement]
    recomputation: Recomputation | None


@dataclass(frozen=True)
class Evidence:
    """Why a worker was banned.

    Args:
        banned: the worker.
        reason: why.
        step: of the latest statement in it.
        keys: the public keys of the banned worker, of all live replicas of its stage, and of whoever else signed something in it.
        messages: signals and rows that matter. A worker that lied signed at least one of them, and one that contradicted itself
            two that contradict each other; about a false word, the signals that it was about.
        testimonies: all votes on these signals.
    """

    banned: Worker
    reason: Reason
    step: int
    keys: Mapping[Worker, PublicKey]
    messages: tuple[Message, ...]
    testimonies: tuple[Testimony, ...]
