"""Verifies the evidence of a ban offline: who signed what, and whether that is a reason for the ban.

What the evidence cannot say for itself is whose keys these are, and that no live worker was left out by all that voted. With a
list of known workers all keys must be on it; without one, compare the keys with those that the run announced when it started. That
most workers of a stage do not conspire is what a run assumes as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.evidence import LIED, MATCHES, OUTCOMES, Evidence, Message, Reason, Testimony, finding_of
from lightning_sentinel.trust.identity import PublicKey
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import SignalStatement, VoteStatement

__all__ = ["Findings", "Said", "verify_evidence"]


@dataclass(frozen=True)
class Said:
    """One statement of the evidence.

    Args:
        words: who said what.
        key: with which it was to be signed; ``None`` if the evidence has no key of that worker.
        fault: what is wrong with it; empty if it holds.
    """

    words: str
    key: PublicKey | None
    fault: str


@dataclass(frozen=True)
class Findings:
    """What evidence shows.

    Args:
        evidence: that was verified.
        statements: all of its statements, signals and rows first, then votes.
        faults: why it does not hold; none if it does.
        verdict: in one sentence.
    """

    evidence: Evidence
    statements: tuple[Said, ...]
    faults: tuple[str, ...]
    verdict: str

    @property
    def holds(self) -> bool:
        """Whether every statement verifies, and together they are a reason for the ban."""
        return not self.faults

    def __str__(self) -> str:
        """A few lines for people: the verdict, and who said what."""
        lines = [f"{'does not verify' if said.fault else 'verifies':<15}  {said.words}" for said in self.statements]
        keys = [f"{worker} signs with {key}" for worker, key in sorted(self.evidence.keys.items())]
        return "\n".join([self.verdict, *lines, *keys])


def verify_evidence(evidence: Evidence, known: Collection[PublicKey] | None = None) -> Findings:
    """Verify the evidence of a ban.

    Args:
        evidence: from :func:`~lightning_sentinel.trust.evidence_files.read_evidence`.
        known: keys of which all keys in the evidence must be; ``None`` if there is no such list.

    Raises:
        ConfigurationError: if a digest was made with BLAKE3, and the package ``blake3`` is not installed.
        MissingExtraError: if the package ``cryptography`` is not installed.

    Example:
        >>> from lightning_sentinel.trust.digests import Algorithm, digest_of
        >>> from lightning_sentinel.trust.identity import Identity
        >>> from lightning_sentinel.trust.signing import sign
        >>> from lightning_sentinel.trust.statements import Moment, RowStatement
        >>> worker, identity, now = Worker(1, 0), Identity.seeded(0, "worker"), Moment(bytes(16), step=12, attempt=0)
        >>> digests = [digest_of(contents, Algorithm.SHA256) for contents in (b"a row", b"another row")]
        >>> rows = tuple(sign(identity, RowStatement(now, worker, digest, digests[0])) for digest in digests)
        >>> keys = {worker: identity.public}
        >>> verify_evidence(Evidence(worker, Reason.CONTRADICTED_ITSELF, 12, keys, rows, testimonies=())).holds
        True
        >>> verify_evidence(Evidence(worker, Reason.CONTRADICTED_ITSELF, 12, keys, rows[:1], testimonies=())).holds
        False
    """
    statements = [*_messages(evidence), *_votes(evidence)]
    faults = [*_wrong_keys(evidence, known), *(f"the {said.words} {said.fault}" for said in statements if said.fault)]
    latest = max((message.statement.moment.step for message in evidence.messages), default=-1)
    if not faults and evidence.step != latest:
        faults.append(f"it names step {evidence.step}, and the latest statement in it is of step {latest}")
    if not faults and len({message.statement.moment.run for message in evidence.messages}) != 1:
        faults.append("its statements are of several runs")
    ground = ""
    if not faults:
        ground = _ground(evidence)
        if not ground:
            faults.append(f"nothing in it shows that {evidence.banned} {_ACCUSATIONS[evidence.reason]}")
    verdict = f"The evidence holds: {ground}." if ground else f"The evidence does not hold: {faults[0]}."
    return Findings(evidence, tuple(statements), tuple(faults), verdict)


_ACCUSATIONS = {
    Reason.LIED: "sent a signal that most workers of its stage found to be false",
    Reason.CONTRADICTED_ITSELF: "signed two different statements about the same thing",
    Reason.WITHHELD: "gave another signal to those who recomputed one than it had signed for",
    Reason.FALSE_WORD: "signed the opposite of what most workers of its stage found",
}


def _wrong_keys(evidence: Evidence, known: Collection[PublicKey] | None) -> Iterator[str]:
    if evidence.banned not in evidence.keys:
        yield f"it has no key of {evidence.banned}, which was banned"
    owners: dict[PublicKey, Worker] = {}
    for worker, key in sorted(evidence.keys.items()):
        if owners.setdefault(key, worker) != worker:
            yield f"{owners[key]} and {worker} have the same key in it, {key}"
        if known is not None and key not in known:
            yield f"the key of {worker}, {key}, is not on the list of known workers"


def _messages(evidence: Evidence) -> Iterator[Said]:
    for message in evidence.messages:
        statement = message.statement
        digest = statement.digest if isinstance(statement, SignalStatement) else statement.row
        yield _said(evidence, message, f"{statement}: {str(digest)[:23]}")


def _votes(evidence: Evidence) -> Iterator[Said]:
    signals = list(_signals(evidence))
    for testimony in evidence.testimonies:
        vote = testimony.vote.statement
        found = testimony.recomputation
        outcome = OUTCOMES[vote.outcome] if vote.outcome < len(OUTCOMES) else f"outcome {vote.outcome}"
        rests_on = "" if found is None else f" (error {found.error:.3g}, tolerance {found.tolerance:.3g})"
        said = _said(evidence, testimony.vote, f"{vote}: {outcome}{rests_on}")
        yield Said(said.words, said.key, said.fault or _fault_of_vote(testimony, signals))


def _said(evidence: Evidence, signed: Message | Signed[VoteStatement], words: str) -> Said:
    key = evidence.keys.get(signed.statement.sender)
    if key is None:
        return Said(words, None, "is of a worker whose key is not in the evidence")
    verifies = signed.verifies(key)
    return Said(words, key, "" if verifies else f"bears no valid signature of {key}: it was changed, or is not its word")


def _fault_of_vote(testimony: Testimony, signals: Iterable[SignalStatement]) -> str:
    """What is wrong with a vote that its own signature is on."""
    vote = testimony.vote.statement
    found = testimony.recomputation
    if not any(_is_about(vote, signal) for signal in signals):
        return "is not about a signal in the evidence"
    if finding_of(found, vote.finding.algorithm) != vote.finding:
        return "was signed for another recomputation than the one in the evidence"
    if vote.outcome in (MATCHES, LIED):
        if found is None:
            return "comes without a recomputation"
        if (vote.outcome == LIED) != (not found.error <= found.tolerance):
            return "does not follow from its own recomputation"
    return ""


def _signals(evidence: Evidence) -> Iterator[SignalStatement]:
    for message in evidence.messages:
        if isinstance(message.statement, SignalStatement):
            yield message.statement


def _is_about(vote: VoteStatement, signal: SignalStatement) -> bool:
    """Whether a vote is one on this signal, by another worker of the stage that sent it."""
    juror = vote.sender.stage == signal.sender.stage and vote.sender != signal.sender
    same_place = (vote.moment, vote.signal) == (signal.moment, signal.signal)
    return juror and same_place and vote.about.names(encode(signal))


def _ground(evidence: Evidence) -> str:
    """Why the worker was banned, in words; empty if the statements, all of which verify, give no reason."""
    if evidence.reason is Reason.CONTRADICTED_ITSELF:
        return _contradiction(evidence)
    grounds = []
    for signal in _signals(evidence):
        votes = [one.vote.statement for one in evidence.testimonies if _is_about(one.vote.statement, signal)]
        outcome, count, live = _majority(evidence, signal, votes)
        share = f"{count} of {live} live workers of its stage"
        if evidence.reason is Reason.LIED and signal.sender == evidence.banned and outcome == LIED:
            grounds.append(f"{evidence.banned} signed the {signal.signal}, of {signal.moment}, and {share} found it to be false")
        if evidence.reason is Reason.WITHHELD and _had_to_hand_over(evidence, signal, outcome):
            words = f"{share} signed that they did not get {_WITHHELD[outcome]} the {signal.signal}, of {signal.moment}"
            grounds.append(f"{words}, and it was for {evidence.banned} to give it to them")
        own = {vote.outcome for vote in votes if vote.sender == evidence.banned}
        opposite = {MATCHES: LIED, LIED: MATCHES}.get(outcome)
        if evidence.reason is Reason.FALSE_WORD and own == {opposite}:
            words = f"{evidence.banned} signed that the {signal.signal}, of {signal.moment}, {_PHRASES[own.pop()]}"
            grounds.append(f"{words}, and {share} signed the opposite")
    return "; ".join(grounds)


_WITHHELD = {2: "the activation behind", 3: "the gradient behind", 5: "the elements of"}


def _had_to_hand_over(evidence: Evidence, audited: SignalStatement, outcome: int) -> bool:
    """Whether the banned worker, by its own signed word, served the lane and the stage that were to hand over what was missing."""
    boundary = audited.signal.boundary
    stages = {2: boundary.sender - 1, 3: boundary.sender + 1, 5: boundary.receiver}
    place = (audited.moment, audited.signal.lane, audited.signal.slot)
    own = [one for one in _signals(evidence) if one.sender == evidence.banned]
    served = any((one.moment, one.signal.lane, one.signal.slot) == place for one in own)
    return served and evidence.banned.stage == stages.get(outcome)


_PHRASES = {MATCHES: "is true", LIED: "is false"}


def _majority(evidence: Evidence, signal: SignalStatement, votes: Iterable[VoteStatement]) -> tuple[int, int, int]:
    """What most of a stage found: outcome, number of votes for it, and of workers that could vote; -1 if no majority decides.

    A sender stands by its signal, which is a vote like the others. How many workers were live is part of what each voter signs, so
    that votes cannot be left out of a file to make a majority of the rest; and all of them must be named in the evidence. Of
    several majorities that of the most live workers counts: a few cannot make one by saying that there were fewer.
    """
    words: dict[Worker, set[tuple[int, int]]] = {}
    for vote in votes:
        words.setdefault(vote.sender, set()).add((vote.outcome, vote.live))
    # A worker that signed two different votes on a signal has none.
    counts = Counter(next(iter(said)) for said in words.values() if len(said) == 1)
    named = sum(worker.stage == signal.sender.stage for worker in evidence.keys)
    totals = [(live, count + (outcome == MATCHES), outcome) for (outcome, live), count in counts.items()]
    deciding = sorted(one for one in totals if 2 * one[1] > one[0] and one[0] <= named)
    if not deciding or [live for live, *_ in deciding].count(deciding[-1][0]) > 1:
        return -1, 0, 0
    live, total, outcome = deciding[-1]
    return outcome, total, live


def _contradiction(evidence: Evidence) -> str:
    """Two statements of the banned worker about one subject; its votes count as well."""
    said: dict[tuple[object, ...], set[bytes]] = {}
    signed = [*evidence.messages, *(one.vote for one in evidence.testimonies)]
    for statement in (one.statement for one in signed if one.statement.sender == evidence.banned):
        encodings = said.setdefault(statement.subject, set())
        encodings.add(encode(statement))
        if len(encodings) > 1:
            return f"{evidence.banned} signed two different statements, each of which is the {statement}"
    return ""
