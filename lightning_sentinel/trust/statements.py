"""What workers sign: statements about signals, about rows of the step's collective, and about what audits showed.

A statement says when, by whom and about what, so that it cannot be passed off as one of another run, step or place. How it becomes
bytes: :mod:`lightning_sentinel.trust.encoding`; how it is signed: :mod:`lightning_sentinel.trust.signing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Boundary, Worker
from lightning_sentinel.trust.digests import Digest

__all__ = [
    "RUN_BYTES",
    "ContributionVote",
    "Kind",
    "Moment",
    "RowStatement",
    "SignalId",
    "SignalStatement",
    "Statement",
    "Transfer",
    "VoteStatement",
]

RUN_BYTES = 16


class Kind(IntEnum):
    """What a message across a boundary carries."""

    SIGNAL = 1
    NOTE = 2
    """The projection of a signal."""

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, order=True)
class Moment:
    """When something was said.

    Args:
        run: 16 bytes that no other run has.
        step: number of the training batch.
        attempt: runs of the schedule so far, repeated steps and evaluations included: no two of them have the same number.

    Raises:
        MalformedMessageError: if ``run`` is of another length.

    Example:
        >>> print(Moment(bytes(16), step=12, attempt=1))
        step 12, attempt 1
    """

    run: bytes
    step: int
    attempt: int

    def __post_init__(self) -> None:
        if len(self.run) != RUN_BYTES:
            raise MalformedMessageError(
                f"A run is named by {len(self.run)} bytes. Name it by {RUN_BYTES}: os.urandom({RUN_BYTES})."
            )

    def __str__(self) -> str:
        return f"step {self.step}, attempt {self.attempt}"


@dataclass(frozen=True, order=True)
class SignalId:
    """Which message of a step it is.

    Args:
        kind: what it carries.
        boundary: that it crosses.
        lane: the pipeline.
        slot: which micro-batch of the lane, in the order of the schedule.

    Example:
        >>> from lightning_sentinel.mesh import Direction
        >>> print(SignalId(Kind.NOTE, Boundary(1, Direction.GRADIENT), lane=0, slot=3))
        gradient note from stage 2 to 1, lane 0, micro-batch 3
    """

    kind: Kind
    boundary: Boundary
    lane: int
    slot: int

    def __str__(self) -> str:
        way = f"from stage {self.boundary.sender} to {self.boundary.receiver}"
        return f"{self.boundary.direction} {self.kind} {way}, lane {self.lane}, micro-batch {self.slot}"


class Transfer(NamedTuple):
    """A message on its way: who sends it, who receives it, and which it is."""

    sender: Worker
    receiver: Worker
    signal: SignalId


@dataclass(frozen=True)
class SignalStatement:
    """ "This is what I sent."

    Args:
        moment: when.
        sender: who says so.
        signal: which message it is.
        tainted: whether the sender knows that what it received was false, and its own signal therefore is.
        digest: of the tensor, its shape and its dtype, from :func:`~lightning_sentinel.trust.digests.digest_of_tensor`.

    Example:
        >>> import torch
        >>> from lightning_sentinel.mesh import Direction
        >>> from lightning_sentinel.trust.digests import Algorithm, digest_of_tensor
                >>> signal = SignalId(Kind.SIGNAL, Boundary(1, Direction.ACTIVATION), lane=0, slot=3)
        >>> digest = digest_of_tensor(torch.ones(2, 5), Algorithm.SHA256)
        >>> said = SignalStatement(Moment(bytes(16), 12, 0), Worker(1, 0), signal, False, digest)
        >>> print(said)
        activation signal from stage 1 to 2, lane 0, micro-batch 3, of step 12, attempt 0, by worker (stage 1, replica 0)
    """

    moment: Moment
    sender: Worker
    signal: SignalId
    tainted: bool
    digest: Digest

    @property
    def subject(self) -> tuple[object, ...]:
        """What the statement is about: a worker that says two different things about one subject contradicts itself."""
        return (type(self), self.moment, self.sender, self.signal)

    def __str__(self) -> str:
        return f"{self.signal}, of {self.moment}, by {self.sender}"


@dataclass(frozen=True)
class RowStatement:
    """ "This is my row of the step's collective, and that is the table that I saw in the step before."

    Args:
        moment: when.
        sender: who says so.
        row: digest of its row.
        table_before: digest of the table before it, from :func:`~lightning_sentinel.trust.commitments.table_digest`.
    """

    moment: Moment
    sender: Worker
    row: Digest
    table_before: Digest

    @property
    def subject(self) -> tuple[object, ...]:
        """See :attr:`SignalStatement.subject`."""
        return (type(self), self.moment, self.sender)

    def __str__(self) -> str:
        return f"row of {self.moment}, by {self.sender}"


@dataclass(frozen=True)
class VoteStatement:
    """ "I have recomputed that signal, and this is what I found."

    Args:
        moment: of the signal.
        sender: who says so, an auditor or a juror.
        signal: which signal it is about.
        about: digest of the encoded :class:`SignalStatement`, so that the vote is about what was signed, and nothing else.
        outcome: number of a :class:`~lightning_sentinel.verification.audit.Outcome`, below 256.
        live: workers of the stage that were not banned, the audited one included: of how many a majority decides.
        finding: digest of what was found, from :func:`~lightning_sentinel.trust.evidence.finding_of`.
    """

    moment: Moment
    sender: Worker
    signal: SignalId
    about: Digest
    outcome: int
    live: int
    finding: Digest

    @property
    def subject(self) -> tuple[object, ...]:
        """See :attr:`SignalStatement.subject`."""
        return (type(self), self.moment, self.sender, self.signal, self.about)

    def __str__(self) -> str:
        return f"vote on the {self.signal}, of {self.moment}, by {self.sender}"


@dataclass(frozen=True)
class ContributionVote:
    """ "I have recomputed what that worker adds to the weight gradients of our stage, and this is what I found."

    Args:
        moment: of the step.
        sender: who says so, an auditor or a juror.
        audited: whose contribution it is.
        about: digest of the sketch of the contribution, which the audited worker has published in its row.
        outcome: as in :class:`VoteStatement`.
        live: as in :class:`VoteStatement`.
        finding: as in :class:`VoteStatement`.

    Example:
        >>> from lightning_sentinel.trust.digests import Algorithm, digest_of
        >>> digest = digest_of(b"a sketch", Algorithm.SHA256)
        >>> print(ContributionVote(Moment(bytes(16), 12, 0), Worker(1, 2), Worker(1, 0), digest, 1, 5, digest))
        vote on the weight gradients of worker (stage 1, replica 0), of step 12, attempt 0, by worker (stage 1, replica 2)
    """

    moment: Moment
    sender: Worker
    audited: Worker
    about: Digest
    outcome: int
    live: int
    finding: Digest

    @property
    def subject(self) -> tuple[object, ...]:
        """See :attr:`SignalStatement.subject`."""
        return (type(self), self.moment, self.sender, self.audited, self.about)

    def __str__(self) -> str:
        return f"vote on the weight gradients of {self.audited}, of {self.moment}, by {self.sender}"


Statement = SignalStatement | RowStatement | VoteStatement | ContributionVote
