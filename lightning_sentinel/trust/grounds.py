"""Why a worker was banned, in words, from statements that all verify: one rule for each reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.commitments import table_digest
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.evidence import LIED, MATCHES, Evidence, Reason
from lightning_sentinel.trust.matters import Finding, Matter, majority, matters, rows_with_contents
from lightning_sentinel.trust.parts import Part, disagreement, read_row
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Moment, RowStatement, SignalStatement
from lightning_sentinel.verification.majority import most_bans, strikes_to_ban

__all__ = ["ACCUSATIONS", "forged_row", "ground_of"]

ACCUSATIONS = {
    Reason.LIED: "sent a signal that most workers of its stage found to be false",
    Reason.CONTRADICTED_ITSELF: "signed two different statements about the same thing",
    Reason.WITHHELD: "gave another signal to those who recomputed one than it had signed for",
    Reason.FALSE_WORD: "signed the opposite of what most workers of its stage found",
    Reason.CONTRIBUTION: "published weight gradients that most workers of its stage found to be false",
    Reason.ROW: "reported a row that most workers of its stage found to be false",
    Reason.NOTE: "sent a note that most workers of the stage that it was for found to be false",
    Reason.CONTRADICTED_OTHERS: "contradicts more workers of one stage than can be malicious there",
    Reason.FORGED: "gave its word a signature that is not its own",
    Reason.SEAL: "did not show what it had drawn and sealed",
    Reason.FLAGGED: "was out of line in as many steps as the rule asks for",
}


def ground_of(evidence: Evidence) -> str:
    """Why the worker was banned; empty if the statements give no reason.

    Args:
        evidence: of which all statements verify, but for a row that is forged.
    """
    return _RULES[evidence.reason](evidence)


def _of_audit(evidence: Evidence) -> str:
    """What most of a stage found false of what the banned worker sent, reported, or added to the weight gradients."""
    grounds = []
    for matter, found in _decided(evidence):
        if matter.shows is evidence.reason and matter.audited == evidence.banned and found.outcome == LIED:
            did = "published in its row what it adds to" if matter.shows is Reason.CONTRIBUTION else "signed"
            grounds.append(f"{evidence.banned} {did} {matter.name} and {_share(found, matter)} found it to be false")
    return "; ".join(grounds)


def _of_withholding(evidence: Evidence) -> str:
    grounds = []
    for matter, found in _decided(evidence):
        if _had_to_hand_over(evidence, matter, found.outcome):
            words = f"{_share(found, matter)} signed that they did not get {_WITHHELD[found.outcome]} {matter.name}"
            grounds.append(f"{words} and it was for {evidence.banned} to give it to them")
    return "; ".join(grounds)


def _of_false_word(evidence: Evidence) -> str:
    grounds = []
    for matter, found in _decided(evidence):
        own = {vote.outcome for vote in matter.votes if vote.sender == evidence.banned}
        if own == {{MATCHES: LIED, LIED: MATCHES}.get(found.outcome)}:
            words = f"{evidence.banned} signed that {matter.name} {_PHRASES[own.pop()]}"
            grounds.append(f"{words}, and {_share(found, matter)} signed the opposite")
    return "; ".join(grounds)


_PHRASES = {MATCHES: "is true", LIED: "is false"}
_WITHHELD = {2: "the activation behind", 3: "the gradient behind", 5: "the elements of"}


def _decided(evidence: Evidence) -> Iterator[tuple[Matter, Finding]]:
    for matter in matters(evidence):
        yield matter, majority(evidence, matter)


def _share(found: Finding, matter: Matter) -> str:
    return f"{found.votes} of {found.live} live workers of {'its stage' if matter.stands else f'stage {matter.stage}'}"


def _had_to_hand_over(evidence: Evidence, matter: Matter, outcome: int) -> bool:
    """Whether the banned worker, by its own signed word, served the lane and the stage that were to hand over what was missing."""
    if matter.shows not in (Reason.LIED, Reason.CONTRIBUTION):
        return False
    signals = [one.statement for one in evidence.messages if isinstance(one.statement, SignalStatement)]
    own = [one for one in signals if one.sender == evidence.banned and one.moment == matter.moment]
    if matter.signal is None:
        # A contribution is made from all micro-batches of the lane that the audited worker served, by its own signed word.
        lanes = {one.signal.lane for one in signals if one.sender == matter.audited and one.moment == matter.moment}
        stages = {2: matter.audited.stage - 1, 3: matter.audited.stage + 1}
        served = any(one.signal.lane in lanes for one in own)
    else:
        signal = matter.signal.signal
        stages = {2: signal.boundary.sender - 1, 3: signal.boundary.sender + 1, 5: signal.boundary.receiver}
        served = any((one.signal.lane, one.signal.slot) == (signal.lane, signal.slot) for one in own)
    return served and evidence.banned.stage == stages.get(outcome)


def _of_two_words(evidence: Evidence) -> str:
    """Two statements of the banned worker about one subject; its votes count as well."""
    said: dict[tuple[object, ...], set[bytes]] = {}
    signed = [*evidence.messages, *(one.vote for one in evidence.testimonies)]
    for statement in (one.statement for one in signed if one.statement.sender == evidence.banned):
        encodings = said.setdefault(statement.subject, set())
        encodings.add(encode(statement))
        if len(encodings) > 1:
            return f"{evidence.banned} signed two different statements, each of which is the {statement}"
    return ""


def _of_contradictions(evidence: Evidence) -> str:
    """The banned worker and others, each in its own signed row, say different things about messages between them."""
    parts = _parts(evidence)
    others: dict[int, list[Worker]] = {}
    for (moment, worker), part in parts.items():
        own = parts.get((moment, evidence.banned))
        apart = worker != evidence.banned and own is not None and disagreement(own, part) is not None
        if apart and worker not in others.setdefault(worker.stage, []):
            others[worker.stage].append(worker)
    for stage, workers in sorted(others.items()):
        live = _of_stage(evidence, stage)
        if strikes_to_ban(live) is not None and len(workers) > most_bans(live):
            names = ", ".join(map(str, sorted(workers)))
            return (
                f"{evidence.banned} signed other words about messages between them than {names}, which are {len(workers)} of {live}"
                f" workers of their stage, of which at most {most_bans(live)} can be malicious"
            )
    return ""


def _parts(evidence: Evidence) -> dict[tuple[Moment, Worker], Part]:
    """What rows say about messages, of those rows that their workers' signatures on messages tell how to read."""
    found = {}
    for (moment, worker), contents in rows_with_contents(evidence).items():
        key = evidence.keys.get(worker)
        part = None if key is None else read_row(contents, worker, moment, key, _of_stage(evidence, worker.stage))
        if part is not None:
            found[moment, worker] = part
    return found


def _of_stage(evidence: Evidence, stage: int) -> int:
    """Workers of a stage whose keys are in the evidence."""
    return sum(worker.stage == stage for worker in evidence.keys)


def forged_row(evidence: Evidence) -> Signed[RowStatement] | None:
    """The banned worker's row that does not bear its signature, in evidence of that; else ``None``."""
    key = evidence.keys.get(evidence.banned)
    if evidence.reason is not Reason.FORGED or key is None:
        return None
    rows = (one for one in _rows(evidence) if one.statement.sender == evidence.banned)
    return next((one for one in rows if not one.verifies(key)), None)


def _of_forgery(evidence: Evidence) -> str:
    forged = forged_row(evidence)
    return _of_unsigned_messages(evidence) if forged is None else _of_unsigned_row(evidence, forged)


def _of_unsigned_row(evidence: Evidence, forged: Signed[RowStatement]) -> str:
    """The row is in a table that most workers have signed to have seen, and its signature does not verify."""
    moment = forged.statement.moment
    table = [one for one in _rows(evidence) if one.statement.moment == moment]
    later = [one.statement for one in _rows(evidence) if one.statement.moment > moment]
    seen = {one.sender for one in later if one.table_before == table_digest(table, one.table_before.algorithm)}
    if 2 * len(seen) <= len(evidence.keys):
        return ""
    return (
        f"{len(seen)} of {len(evidence.keys)} workers signed that they saw the table of {moment}, in which the row of"
        f" {evidence.banned} bears a signature that is not its own"
    )


def _of_unsigned_messages(evidence: Evidence) -> str:
    """A signed row that names messages whose signatures beside it do not verify."""
    key = evidence.keys.get(evidence.banned)
    for (moment, worker), part in _parts(evidence).items():
        if worker == evidence.banned and key is not None:
            for signal, sent in part.sent.items():
                if not sent.verifies(key):
                    return f"{worker} signed a row in which it says that it sent the {signal}, of {moment}, and did not sign that"
    return ""


def _rows(evidence: Evidence) -> Iterator[Signed[RowStatement]]:
    for one in evidence.messages:
        if isinstance(one.statement, RowStatement):
            yield Signed(one.statement, one.signature)


def _of_flags(evidence: Evidence) -> str:
    record = evidence.record
    return "" if record is None or record.fault(evidence.banned) else record.ground(evidence.banned)


_RULES: dict[Reason, Callable[[Evidence], str]] = {
    Reason.LIED: _of_audit,
    Reason.CONTRIBUTION: _of_audit,
    Reason.WITHHELD: _of_withholding,
    Reason.FALSE_WORD: _of_false_word,
    Reason.CONTRADICTED_ITSELF: _of_two_words,
    Reason.CONTRADICTED_OTHERS: _of_contradictions,
    Reason.FORGED: _of_forgery,
    Reason.SEAL: lambda evidence: "",
    Reason.FLAGGED: _of_flags,
    Reason.ROW: _of_audit,
    Reason.NOTE: _of_audit,
}
