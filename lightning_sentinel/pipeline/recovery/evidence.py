"""Evidence of bans that audits led to: the signed words of a step that show why a worker was banned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.evidence import Evidence, Reason, Testimony
from lightning_sentinel.trust.statements import SignalId
from lightning_sentinel.trust.verify_evidence import verify_evidence

__all__ = ["evidence_of_bans"]


def evidence_of_bans(
    banned: Collection[Worker],
    testimonies: Mapping[SignalId, Sequence[Testimony]],
    commitments: StepCommitments,
    credentials: Credentials,
) -> dict[Worker, Evidence]:
    """The evidence of a step's bans, the same on all ranks.

    Args:
        banned: the workers that the step bans.
        testimonies: the signed votes on the step's signals.
        commitments: what workers have signed about the signals that they sent.
        credentials: with the keys of all workers.

    Returns:
        evidence that holds, by worker. A worker has none if nothing was signed, or if it was banned for something that others
        cannot be shown, such as its scores.
    """
    found = {}
    for worker in banned if credentials.keys else ():
        candidates = _candidates(worker, testimonies, commitments, credentials)
        evidence = next((one for one in candidates if verify_evidence(one).holds), None)
        if evidence is not None:
            found[worker] = evidence
    return found


def _candidates(
    worker: Worker,
    testimonies: Mapping[SignalId, Sequence[Testimony]],
    commitments: StepCommitments,
    credentials: Credentials,
) -> Iterator[Evidence]:
    """What each signal on which there were votes may show against a worker."""
    for signal, votes in testimonies.items():
        about = commitments.sent[signal]
        messages = [about]
        reason = Reason.LIED
        if about.statement.sender != worker:
            # What it sent of the same micro-batch shows that it was its part to hand over what was asked for.
            lane = [one for key, one in commitments.sent.items() if (key.lane, key.slot) == (signal.lane, signal.slot)]
            messages += [one for one in lane if one.statement.sender == worker][:1]
            reason = Reason.WITHHELD
        stage = {other for other in credentials.keys if other.stage == signal.boundary.sender}
        keys = {other: credentials.keys[other] for other in sorted(stage | {worker})}
        yield Evidence(worker, reason, about.statement.moment.step, keys, tuple(messages), tuple(votes))
