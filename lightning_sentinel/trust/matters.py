"""What the votes in evidence are on, and what most of a stage found of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Digest, digest_of
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.evidence import LIED, MATCHES, Evidence, Reason, Testimony, finding_of
from lightning_sentinel.trust.records import ROW_BYTES
from lightning_sentinel.trust.statements import (
    ContributionVote,
    Kind,
    Moment,
    RowStatement,
    SignalId,
    SignalStatement,
    VoteStatement,
)
from lightning_sentinel.verification.sketches import SKETCHED

__all__ = ["Finding", "Matter", "fault_of_vote", "majority", "matters", "rows_with_contents"]

_SKETCH_BYTES = 4 * SKETCHED
_ALIGNED = 4
_MANY = 3
"""Of two workers either may be the liar; where there are fewer than three, none of another stage is blamed on their word."""


class Matter(NamedTuple):
    """Something that was audited.

    Args:
        audited: whose word it is.
        name: of it, as it stands in a sentence.
        moment: of it.
        shows: why a worker is banned of whose word most say that it is false.
        stage: whose workers vote.
        votes: on it, in the evidence.
        signal: what its sender signed; ``None`` if it stands in a row.
    """

    audited: Worker
    name: str
    moment: Moment
    shows: Reason
    stage: int
    votes: tuple[VoteStatement | ContributionVote, ...]
    signal: SignalStatement | None = None

    @property
    def stands(self) -> bool:
        """Whether the audited worker is one of those that decide: then it stands by its word, which is a vote like the others."""
        return self.audited.stage == self.stage


class Finding(NamedTuple):
    """What most of a stage found.

    Args:
        outcome: number of the outcome; -1 if no majority decides.
        votes: workers that say so.
        live: workers that could.
    """

    outcome: int
    votes: int
    live: int


def matters(evidence: Evidence) -> list[Matter]:
    """All that the votes of evidence are on: its signals and notes first, then what stands in its rows."""
    ballots = [one.vote.statement for one in evidence.testimonies]
    signals = (one.statement for one in evidence.messages if isinstance(one.statement, SignalStatement))
    found = [_of_message(signal, ballots) for signal in signals]
    for (moment, audited), contents in rows_with_contents(evidence).items():
        found += _in_row(moment, audited, contents, [vote for vote in ballots if vote.moment == moment and vote.sender != audited])
    return found


def rows_with_contents(evidence: Evidence) -> dict[tuple[Moment, Worker], bytes]:
    """The contents of those rows of which the evidence has them, by moment and worker."""
    rows = [one.statement for one in evidence.messages if isinstance(one.statement, RowStatement)]
    return {(row.moment, row.sender): contents for contents in evidence.contents for row in rows if row.row.names(contents)}


def fault_of_vote(testimony: Testimony, about: Iterable[Matter]) -> str:
    """What is wrong with a vote that its own signature is on; empty if nothing is.

    Args:
        testimony: the vote, and what it rests on.
        about: what the evidence has votes on.
    """
    vote = testimony.vote.statement
    found = testimony.recomputation
    if not any(vote in one.votes for one in about):
        what = "weight gradients in a row of" if isinstance(vote, ContributionVote) else "a signal in"
        return f"is not about {what} the evidence"
    if finding_of(found, vote.finding.algorithm) != vote.finding:
        return "was signed for another recomputation than the one in the evidence"
    if vote.outcome in (MATCHES, LIED):
        if found is None:
            return "comes without a recomputation"
        if (vote.outcome == LIED) != (not found.error <= found.tolerance):
            return "does not follow from its own recomputation"
    return ""


def majority(evidence: Evidence, matter: Matter) -> Finding:
    """What most of a stage found.

    How many workers were live is part of what each voter signs, so that votes cannot be left out of a file to make a majority of
    the rest; and all of them must be named in the evidence. Of several majorities that of the most live workers counts: a few
    cannot make one by saying that there were fewer.
    """
    words: dict[Worker, set[tuple[int, int]]] = {}
    for vote in matter.votes:
        words.setdefault(vote.sender, set()).add((vote.outcome, vote.live))
    # A worker that signed two different votes has none.
    counts = Counter(next(iter(said)) for said in words.values() if len(said) == 1)
    named = sum(worker.stage == matter.stage for worker in evidence.keys)
    totals = [(live, count + (matter.stands and outcome == MATCHES), outcome) for (outcome, live), count in counts.items()]
    totals = [one for one in totals if matter.stands or one[0] >= _MANY]
    # Where nobody signs there are no keys that name them.
    deciding = sorted(one for one in totals if 2 * one[1] > one[0] and (one[0] <= named or not evidence.keys))
    if not deciding or [live for live, *_ in deciding].count(deciding[-1][0]) > 1:
        return Finding(-1, 0, 0)
    live, total, outcome = deciding[-1]
    return Finding(outcome, total, live)


def _of_message(signal: SignalStatement, ballots: Sequence[VoteStatement | ContributionVote]) -> Matter:
    """A signal, which those of its sender's stage recompute, or a note, which those that it was for compare with the signal."""
    boundary = signal.signal.boundary
    is_note = signal.signal.kind is Kind.NOTE
    stage = boundary.receiver + (boundary.receiver - boundary.sender) if is_note else signal.sender.stage
    named = _digests_of(encode(signal), ballots)
    votes = tuple(
        vote
        for vote in ballots
        if isinstance(vote, VoteStatement)
        and (vote.moment, vote.signal) == (signal.moment, signal.signal)
        and vote.sender.stage == stage
        and vote.sender != signal.sender
        and vote.about in named
    )
    shows = Reason.NOTE if is_note else Reason.LIED
    return Matter(signal.sender, f"the {signal.signal}, of {signal.moment},", signal.moment, shows, stage, votes, signal)


def _in_row(
    moment: Moment, audited: Worker, contents: bytes, ballots: Sequence[VoteStatement | ContributionVote]
) -> Iterator[Matter]:
    """What others of its stage say of a worker's row: of the sketch of its weight gradients, and of signals that it received."""
    on_row: dict[SignalId | None, dict[Digest, list[VoteStatement | ContributionVote]]] = {}
    for vote in ballots:
        if vote.sender.stage != audited.stage:
            continue
        if isinstance(vote, ContributionVote):
            stands_there = vote.audited == audited and _contains(contents, vote.about, _SKETCH_BYTES)
            signal = None
        else:
            signal = vote.signal
            stands_there = signal.boundary.receiver == audited.stage and _contains(contents, vote.about, ROW_BYTES)
        if stands_there:
            on_row.setdefault(signal, {}).setdefault(vote.about, []).append(vote)
    for signal, by_digest in on_row.items():
        for votes in by_digest.values():
            what = f"the weight gradients of {audited}" if signal is None else f"what {audited} reported of the {signal}"
            shows = Reason.CONTRIBUTION if signal is None else Reason.ROW
            yield Matter(audited, f"{what}, of {moment},", moment, shows, audited.stage, tuple(votes))


def _digests_of(contents: bytes, ballots: Iterable[VoteStatement | ContributionVote]) -> set[Digest]:
    """The digests of contents, by each algorithm with which voters name what they vote on."""
    return {digest_of(contents, algorithm) for algorithm in {vote.about.algorithm for vote in ballots}}


def _contains(contents: bytes, digest: Digest, length: int) -> bool:
    """Whether so many bytes with this digest are in a row, wherever in it that is."""
    places = range(0, len(contents) - length + 1, _ALIGNED)
    return any(digest.names(contents[place : place + length]) for place in places)
