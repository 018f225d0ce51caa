"""Evidence for tests: a stage of five, of which workers 0 and 1 are malicious."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Algorithm, digest_of
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.evidence import LIED, MATCHES, Evidence, Reason, Recomputation, Testimony, finding_of
from lightning_sentinel.trust.signing import Signed, sign
from lightning_sentinel.trust.statements import SignalStatement, VoteStatement
from tests.trust.statements import PLACE, SIGNAL, digest, identity

SHA = Algorithm.SHA256
STAGE = [Worker(1, replica) for replica in range(5)]
KEYS = {worker: identity(worker).public for worker in STAGE}
TOLERANCE = 1e-3


def signal(sender: Worker = STAGE[0], **change: Any) -> Signed[SignalStatement]:
    place = dataclasses.replace(PLACE, lane=sender.replica)
    return sign(identity(sender), dataclasses.replace(SIGNAL, sender=sender, **{"signal": place, **change}))


def testimony(about: Signed[SignalStatement], juror: Worker, outcome: int, live: int = 5, error: float | None = None) -> Testimony:
    said = about.statement
    found = Recomputation(digest(f"what {juror} recomputed"), error or {MATCHES: 1e-6, LIED: 0.8}[outcome], TOLERANCE)
    named = digest_of(encode(said), SHA)
    vote = VoteStatement(said.moment, juror, said.signal, named, outcome, live, finding_of(found, SHA))
    return Testimony(sign(identity(juror), vote), found)


testimony.__test__ = False  # type: ignore[attr-defined]


def votes(about: Signed[SignalStatement], outcomes: Mapping[int, int], live: int = 5) -> tuple[Testimony, ...]:
    return tuple(testimony(about, STAGE[replica], outcome, live) for replica, outcome in outcomes.items())


def of_a_lie(outcomes: Mapping[int, int] | None = None, live: int = 5) -> Evidence:
    """Its accomplice says that all is well, and three honest workers do not."""
    sent = signal()
    said = {1: MATCHES, 2: LIED, 3: LIED, 4: LIED} if outcomes is None else outcomes
    return Evidence(STAGE[0], Reason.LIED, 12, KEYS, (sent,), votes(sent, said, live))


def of_a_contradiction() -> Evidence:
    messages = (signal(), signal(digest=digest("another signal")))
    return Evidence(STAGE[0], Reason.CONTRADICTED_ITSELF, 12, {STAGE[0]: KEYS[STAGE[0]]}, messages, ())


def of_a_false_word() -> Evidence:
    """Worker 1 says that the signals of honest worker 2 are false, and of liar 0 that they are true."""
    honest, lie = signal(STAGE[2]), signal(STAGE[0])
    said = votes(honest, {0: LIED, 1: LIED, 3: MATCHES, 4: MATCHES}) + votes(lie, {1: MATCHES, 2: LIED, 3: LIED, 4: LIED})
    return Evidence(STAGE[1], Reason.FALSE_WORD, 12, KEYS, (honest, lie), said)
