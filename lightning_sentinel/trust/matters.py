"""What the votes in evidence are on, and what most of a stage found of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.evidence import LIED, MATCHES, Evidence, Testimony, finding_of
from lightning_sentinel.trust.statements import ContributionVote, Moment, RowStatement, SignalStatement, VoteStatement
from lightning_sentinel.verification.sketches import SKETCHED

__all__ = ["Finding", "Matter", "fault_of_vote", "majority", "matters", "rows_with_contents"]

_SKETCH_BYTES = 4 * SKETCHED
_ALIGNED = 4


class Matter(NamedTuple):
    """Something that was audited.

    Args:
        audited: whose word it is.
        name: of it, as it stands in a sentence.
        moment: of it.
        signal: what its sender signed; ``None`` for a contribution to weight gradients.
        votes: on it, in the evidence.
    """

    audited: Worker
    name: str
    moment: Moment
    signal: SignalStatement | None
    votes: tuple[VoteStatement | ContributionVote, ...]

    @property
    def stage(self) -> int:
        """The stage whose workers vote."""
        return self.audited.stage


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
    """All that the votes of evidence are on: its signals first, then the contributions in its rows."""
    ballots = [one.vote.statement for one in evidence.testimonies]
    found = [_of_signal(signal, ballots) for signal in _signals(evidence)]
    rows = rows_with_contents(evidence)
    of_weights: dict[tuple[Moment, Worker, Digest], list[ContributionVote]] = {}
    for vote in ballots:
        if isinstance(vote, ContributionVote) and _is_juror(vote.sender, vote.audited):
            of_weights.setdefault((vote.moment, vote.audited, vote.about), []).append(vote)
    for (moment, audited, about), votes in of_weights.items():
        if _publishes(rows.get((moment, audited), b""), about):
            found.append(Matter(audited, f"the weight gradients of {audited}, of {moment},", moment, None, tuple(votes)))
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

    Who is audited stands by its word, which is a vote like the others. How many workers were live is part of what each voter signs,
    so that votes cannot be left out of a file to make a majority of the rest; and all of them must be named in the evidence. Of
    several majorities that of the most live workers counts: a few cannot make one by saying that there were fewer.
    """
    words: dict[Worker, set[tuple[int, int]]] = {}
    for vote in matter.votes:
        words.setdefault(vote.sender, set()).add((vote.outcome, vote.live))
    # A worker that signed two different votes has none.
    counts = Counter(next(iter(said)) for said in words.values() if len(said) == 1)
    named = sum(worker.stage == matter.stage for worker in evidence.keys)
    totals = [(live, count + (outcome == MATCHES), outcome) for (outcome, live), count in counts.items()]
    # Where nobody signs there are no keys that name them.
    deciding = sorted(one for one in totals if 2 * one[1] > one[0] and (one[0] <= named or not evidence.keys))
    if not deciding or [live for live, *_ in deciding].count(deciding[-1][0]) > 1:
        return Finding(-1, 0, 0)
    live, total, outcome = deciding[-1]
    return Finding(outcome, total, live)


def _of_signal(signal: SignalStatement, ballots: Iterable[VoteStatement | ContributionVote]) -> Matter:
    votes = tuple(vote for vote in ballots if isinstance(vote, VoteStatement) and _is_about(vote, signal))
    return Matter(signal.sender, f"the {signal.signal}, of {signal.moment},", signal.moment, signal, votes)


def _signals(evidence: Evidence) -> Iterator[SignalStatement]:
    for message in evidence.messages:
        if isinstance(message.statement, SignalStatement):
            yield message.statement


def _is_about(vote: VoteStatement, signal: SignalStatement) -> bool:
    """Whether a vote is one on this signal, by another worker of the stage that sent it."""
    same_place = (vote.moment, vote.signal) == (signal.moment, signal.signal)
    return _is_juror(vote.sender, signal.sender) and same_place and vote.about.names(encode(signal))


def _is_juror(voter: Worker, audited: Worker) -> bool:
    return voter.stage == audited.stage and voter != audited


def _publishes(contents: bytes, sketch: Digest) -> bool:
    """Whether a row has the sketch of a contribution in it, wherever in it that is."""
    places = range(0, len(contents) - _SKETCH_BYTES + 1, _ALIGNED)
    return any(sketch.names(contents[place : place + _SKETCH_BYTES]) for place in places)
