"""Verifies the evidence of a ban offline: who signed what, and whether that is a reason for the ban.

What evidence cannot say for itself it says that it cannot: whose keys these are, for instance. With a list of known workers all
keys must be on it; without one, compare the keys with those that the run announced when it started. That most workers of a stage do
not conspire is what a run assumes as well. Evidence that nobody signed is a record: of it can be shown that the ban follows from
what it says, and not that this is true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.evidence import OUTCOMES, Ballot, Evidence, Message, Reason
from lightning_sentinel.trust.grounds import ACCUSATIONS, forged_row, ground_of
from lightning_sentinel.trust.identity import SIGNATURE_BYTES, PublicKey
from lightning_sentinel.trust.matters import fault_of_vote, matters, rows_with_contents
from lightning_sentinel.trust.records import FlaggedSignal
from lightning_sentinel.trust.statements import RowStatement, SignalStatement

__all__ = ["Findings", "Said", "verify_evidence"]

_NO_SIGNATURE = bytes(SIGNATURE_BYTES)
_REMEDY = "Compare it with the file in the log directory of the run; if that is the same, do not believe it."


@dataclass(frozen=True)
class Said:
    """One statement of the evidence.

    Args:
        words: who said what.
        key: with which it was to be signed; ``None`` if the evidence has no key of that worker.
        fault: what is wrong with it; empty if it holds.
        mark: what a list of statements says of it.
    """

    words: str
    key: PublicKey | None
    fault: str
    mark: str = "verifies"


@dataclass(frozen=True)
class Findings:
    """What evidence shows.

    Args:
        evidence: that was verified.
        statements: all of its statements, signals and rows first, then votes.
        faults: why it does not hold; none if it does.
        verdict: in one sentence, and another one about what to do if it does not hold.
        proves: whether signatures prove it; else it is a record, of which only can be shown that the ban follows from it.
        limits: what cannot be verified.
    """

    evidence: Evidence
    statements: tuple[Said, ...]
    faults: tuple[str, ...]
    verdict: str
    proves: bool = True
    limits: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every statement verifies, and together they are a reason for the ban."""
        return not self.faults

    def __str__(self) -> str:
        """Some lines for people: the verdict, who said what, and what nobody can tell from the file."""
        lines = [f"{'does not verify' if said.fault else said.mark:<15}  {said.words}" for said in self.statements]
        keys = [f"{worker} signs with {key}" for worker, key in sorted(self.evidence.keys.items())]
        return "\n".join(
            [self.verdict, *lines, *_recorded(self.evidence), *keys, *(f"Not verified: {one}." for one in self.limits)]
        )


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
    # What follows from statements is looked at if they are all as they were signed.
    faults = faults or list(_faults_together(evidence))
    said_anything = bool(evidence.messages or evidence.testimonies or evidence.record)
    ground = ground_of(evidence) if said_anything and not faults else ""
    accusation = f"{evidence.banned} {ACCUSATIONS[evidence.reason]}"
    if not faults and not ground and (said_anything or evidence.keys):
        why = "" if evidence.record is None else evidence.record.fault(evidence.banned)
        faults.append(why or f"nothing in it shows that {accusation}")
    if faults:
        return Findings(evidence, tuple(statements), tuple(faults), f"The evidence does not hold: {faults[0]}. {_REMEDY}", False)
    proves = bool(evidence.keys) and evidence.reason is not Reason.FLAGGED
    if proves:
        verdict = f"The evidence holds: {ground}."
    elif ground:
        verdict = f"This is a record and no proof: {_why_no_proof(evidence)}. By what it says {ground}."
    else:
        verdict = f"This is a record and no proof: it says that {accusation}, and nothing in it shows that."
    return Findings(evidence, tuple(statements), (), verdict, proves, tuple(_limits(evidence, known)))


def _why_no_proof(evidence: Evidence) -> str:
    signers = {message.statement.sender for message in evidence.messages}
    if not evidence.keys:
        return "nobody signed it"
    return f"{len(signers)} workers signed the rows in it, and nobody recomputed what they say"


def _faults_together(evidence: Evidence) -> Iterator[str]:
    """What is wrong with statements that are as they were signed."""
    moments = [one.statement.moment for one in (*evidence.messages, *(each.vote for each in evidence.testimonies))]
    runs = sorted({moment.run.hex()[:8] for moment in moments})
    if len(runs) > 1:
        yield f"its statements are of several runs, {' and '.join(runs)}"
    steps = [moment.step for moment in moments]
    if evidence.record is not None:
        steps += [one.step for one in evidence.record.steps]
    if steps and evidence.step != max(steps):
        yield f"it names step {evidence.step}, and the latest statement in it is of step {max(steps)}"
    bound = set(rows_with_contents(evidence).values())
    for number, contents in enumerate(evidence.contents):
        if contents not in bound:
            yield f"contents[{number}], of {len(contents)} bytes, are of no row that anybody has signed in it"
    votes = Counter(one.vote.encode() for one in evidence.testimonies)
    twice = next((one.vote.statement for one in evidence.testimonies if votes[one.vote.encode()] > 1), None)
    if twice is not None:
        yield f"the {twice} is in it more than once"
    yield from _unreported(evidence)


def _unreported(evidence: Evidence) -> Iterator[str]:
    """Rows of a record that their receivers, who signed rows of that step, did not report."""
    rows: dict[tuple[int, Worker], list[bytes]] = {}
    for (moment, worker), contents in rows_with_contents(evidence).items():
        rows.setdefault((moment.step, worker), []).append(contents)
    for one in () if evidence.record is None else evidence.record.steps:
        for signal in one.signals:
            signed = rows.get((one.step, signal.receiver))
            if signed is not None and not any(signal.row in contents for contents in signed):
                yield f"the row that {signal.receiver} signed in step {one.step} says something else of lane {signal.lane}"


def _limits(evidence: Evidence, known: Collection[PublicKey] | None) -> Iterator[str]:
    """What the file cannot show."""
    if evidence.keys and known is None:
        yield "whose keys these are; compare them with those of the run, or give --known-workers"
    if not evidence.keys:
        yield "who says so, because nobody signed it"
    if evidence.testimonies:
        yield "that voters recomputed what they say, which takes the run; that most of a stage do not lie is what a run assumes"
    if evidence.reason is Reason.CONTRADICTED_OTHERS and evidence.keys:
        yield "that no other worker of the stage was live, whose key would be in it"
    if evidence.reason is Reason.FLAGGED:
        yield "that scores and cumulative sums follow from the rows, which takes all that the run had learned by then"
        yield "that receivers measured what they report"


def _recorded(evidence: Evidence) -> Iterator[str]:
    for one in () if evidence.record is None else evidence.record.steps:
        for signal in one.signals:
            if signal.flagged:
                yield f"{'flagged':<15}  {_flag(one.step, signal)}"


def _flag(step: int, signal: FlaggedSignal) -> str:
    place = f"{signal.boundary.direction} of step {step}, lane {signal.lane}, micro-batch {signal.slot}"
    return f"{place}, received by {signal.receiver}: score {signal.score:.3g}, feature {signal.feature}"


def _wrong_keys(evidence: Evidence, known: Collection[PublicKey] | None) -> Iterator[str]:
    if evidence.keys and evidence.banned not in evidence.keys:
        yield f"it has no key of {evidence.banned}, which was banned"
    owners: dict[PublicKey, Worker] = {}
    for worker, key in sorted(evidence.keys.items()):
        if owners.setdefault(key, worker) != worker:
            yield f"{owners[key]} and {worker} have the same key in it, {key}"
        if known is not None and key not in known:
            yield f"the key of {worker}, {key}, is not on the list of known workers"


def _messages(evidence: Evidence) -> Iterator[Said]:
    forged = forged_row(evidence)
    for message in evidence.messages:
        statement = message.statement
        digest = statement.digest if isinstance(statement, SignalStatement) else statement.row
        said = _said(evidence, message, f"{statement}: {str(digest)[:23]}")
        # The digest of the table, which others have signed, has the signatures of all rows in it, valid or not.
        in_table = forged is not None and isinstance(statement, RowStatement) and statement.moment == forged.statement.moment
        yield Said(said.words, said.key, "", "forged") if in_table and said.fault and said.key is not None else said


def _votes(evidence: Evidence) -> Iterator[Said]:
    about = matters(evidence)
    for testimony in evidence.testimonies:
        vote = testimony.vote.statement
        found = testimony.recomputation
        outcome = OUTCOMES[vote.outcome] if vote.outcome < len(OUTCOMES) else f"outcome {vote.outcome}"
        rests_on = "" if found is None else f" (error {found.error:.3g}, tolerance {found.tolerance:.3g})"
        said = _said(evidence, testimony.vote, f"{vote}: {outcome}{rests_on}")
        yield Said(said.words, said.key, said.fault or fault_of_vote(testimony, about), said.mark)


def _said(evidence: Evidence, signed: Message | Ballot, words: str) -> Said:
    key = evidence.keys.get(signed.statement.sender)
    if key is None and not evidence.keys and signed.signature == _NO_SIGNATURE:
        return Said(words, None, "", "not signed")
    if key is None:
        return Said(words, None, "is of a worker whose key is not in the evidence")
    verifies = signed.verifies(key)
    return Said(words, key, "" if verifies else f"bears no valid signature of {key}: it was changed, or is not its word")
