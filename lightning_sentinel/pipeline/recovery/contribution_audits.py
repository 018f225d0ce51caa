"""Audits of weight gradients between processes: an auditor recomputes all that a worker added to its stage's in a step.

As for a signal (:mod:`lightning_sentinel.pipeline.recovery.auditing`) the auditor gets what the worker had received from those that
sent it, compared with the digests that they had committed to: of all of its micro-batches, one after another. It adds up the
gradients of its own backward passes, and compares the sketch of the sum with the one in the step's table, which all ranks have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.data.sample_exchange import supplier, unpacked
from lightning_sentinel.pipeline.messages.tensor_trees import receive_tree, send_tree
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.recovery.examination import Inputs
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.recovery.votes import (
    Vote,
    encode,
    lie_of,
    of_auditor,
    says_of_weights,
    sketch_bytes,
    testimony,
)
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.waiting import on_host
from lightning_sentinel.trust.digests import digest_of
from lightning_sentinel.trust.evidence import Recomputation, Testimony
from lightning_sentinel.trust.statements import ContributionVote, Kind, SignalId
from lightning_sentinel.verification.audit import tolerance
from lightning_sentinel.verification.jury import ContributionCase
from lightning_sentinel.verification.majority import live_workers
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.sketches import sketch_error
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["ContributionAudits", "StageRecomputation"]

_WITHHELD = {Direction.ACTIVATION: Outcome.ACTIVATION_WITHHELD, Direction.GRADIENT: Outcome.GRADIENT_WITHHELD}
_FROM = {Direction.ACTIVATION: -1, Direction.GRADIENT: 1}
"""The stage, from that of the audited worker, that sent it a signal of this direction."""


class StageRecomputation(NamedTuple):
    """Recomputes weight gradients of this rank's stage.

    Args:
        samples: returns ``[batch, samples, weight]`` of one of this replica's micro-batches.
        gradients: returns the gradients that an honest worker adds for a micro-batch, from what it received.
        sketch: returns the sketch of gradients of the stage, in the units of the step's table.
        computed_in: returns the dtype in which this worker's device multiplies float32.
    """

    samples: Callable[[MicroBatchId], Any]
    gradients: Callable[[MicroBatchId, Inputs], list[Tensor | None]]
    sketch: Callable[[Sequence[Tensor | None]], Tensor]
    computed_in: Callable[[], torch.dtype]


class ContributionAudits:
    """The audits of weight gradients that this rank takes part in.

    Args:
        mesh: all workers.
        worker: the worker that this rank is.
        cache: the signals that this rank sent and received.
        stage: recomputes weight gradients.
        transcript: with which this rank signs its votes, and binds itself to those that it heard.
    """

    def __init__(self, mesh: Mesh, worker: Worker, cache: SignalCache, stage: StageRecomputation, transcript: Transcript) -> None:
        self._mesh = mesh
        self._worker = worker
        self._cache = cache
        self._stage = stage
        self._transcript = transcript
        self.adversary: Adversary | None = None
        """A simulated attacker, which may also lie in its votes."""
        self.testimonies: dict[Worker, list[Testimony]] = {}
        """The votes on contributions of the step under way, by the audited worker, as far as they are signed."""

    def begin(self, adversary: Adversary | None = None) -> None:
        """Begin a step.

        Args:
            adversary: a simulated attacker, which may also lie in its votes.
        """
        self.adversary = adversary
        self.testimonies = {}

    def ask(
        self,
        asked: Sequence[tuple[ContributionCase, Worker]],
        plan: StepPlan,
        sketches: Tensor,
        commitments: StepCommitments,
    ) -> list[Outcome]:
        """Have workers recompute contributions; to be called by all ranks.

        Args:
            asked: the contributions, and the worker that recomputes each.
            plan: the step's plan.
            sketches: ``(stages, replicas, SKETCHED)``, of the contributions, from the step's table.
            commitments: what workers said about the signals that they sent.

        Returns:
            the vote of each of these workers.
        """
        if not asked:
            return []
        said = b""
        for case, auditor in asked:
            # All ranks go through all cases and micro-batches in the same order, so that no two wait for each other.
            vote = self._vote(case, auditor, plan, sketches, commitments)
            said += encode(Vote(Outcome.MATCHES) if vote is None else self._signed(vote, case, auditor, plan, sketches))
        everyone = world().all_gather(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        self._transcript.hear(everyone)
        return [self._heard(everyone, number, *one, plan, sketches) for number, one in enumerate(asked)]

    def _says(self, vote: Vote, case: ContributionCase, auditor: Worker, plan: StepPlan, sketches: Tensor) -> ContributionVote:
        credentials = self._transcript.credentials
        audited = case.audited
        live = live_workers(audited.stage, plan.banned, self._mesh)
        sketch = sketches[audited.stage, audited.replica]
        return says_of_weights(vote, auditor, audited, sketch, plan.moment(credentials.run), live, credentials)

    def _signed(self, vote: Vote, case: ContributionCase, auditor: Worker, plan: StepPlan, sketches: Tensor) -> Vote:
        """This rank's vote with its signature; another one, if a simulated attacker says so."""
        if self.adversary is not None:
            said = Outcome(self.adversary.vote(vote.word, auditor, case.audited, Direction.GRADIENT, plan.number))
            vote = lie_of(vote, said, self._transcript.credentials.algorithm)
        statement = self._says(vote, case, auditor, plan, sketches)
        return replace(vote, signature=self._transcript.credentials.sign(statement).signature)

    def _heard(
        self, everyone: Tensor, number: int, case: ContributionCase, auditor: Worker, plan: StepPlan, sketches: Tensor
    ) -> Outcome:
        """The vote of an auditor, the same on all ranks; it counts only if it is signed."""
        vote = of_auditor(everyone, self._mesh.rank(auditor), number)
        words = testimony(vote, self._says(vote, case, auditor, plan, sketches), self._transcript.credentials)
        if words is None:
            return Outcome.MATCHES
        self.testimonies.setdefault(case.audited, []).append(words)
        return vote.word

    def _vote(
        self, case: ContributionCase, auditor: Worker, plan: StepPlan, sketches: Tensor, commitments: StepCommitments
    ) -> Vote | None:
        """This rank's vote on a case, not signed yet; ``None`` on other ranks than the auditor's, which hand over what is asked."""
        samples = plan.sizes.samples
        work = [one for one in plan.wiring.work[case.lane] if samples[one.replica]]
        total: list[Tensor | None] | None = None
        vote: Vote | None = None
        for slot, micro_batch_id in enumerate(work):
            given = self._handed(case, auditor, slot, micro_batch_id, plan, commitments)
            # An auditor that has made up its mind still receives what the others send it.
            if given is None or vote is not None:
                continue
            if isinstance(given, Outcome):
                vote = Vote(given)
                continue
            found = self._recomputed(case, micro_batch_id, given)
            if found is None:
                vote = Vote(Outcome.MATCHES)
            else:
                total = found if total is None else [_added(*both) for both in zip(total, found)]
        if auditor != self._worker or vote is not None:
            return vote
        dtype = next((one.dtype for one in total or () if one is not None), torch.float32)
        (sketch,) = on_host([self._stage.sketch(total or [])])
        error = float(sketch_error(sketches[case.audited.stage, case.audited.replica], sketch))
        allowed = tolerance(dtype, self._stage.computed_in())
        recomputed = digest_of(sketch_bytes(sketch), self._transcript.credentials.algorithm)
        word = Outcome.LIED if error > allowed else Outcome.MATCHES
        return Vote(word, recomputation=Recomputation(recomputed, error, allowed))

    def _handed(
        self,
        case: ContributionCase,
        auditor: Worker,
        slot: int,
        micro_batch_id: MicroBatchId,
        plan: StepPlan,
        commitments: StepCommitments,
    ) -> Inputs | Outcome | None:
        """Send or receive what the auditor needs of a micro-batch. Returns it on the auditor's rank, or the vote that it means."""
        stage = case.audited.stage
        ends = stage in (0, self._mesh.stages - 1)
        giver = supplier(micro_batch_id, stage, self._mesh, plan.absent, case.audited)
        batch = self._pass_on(giver, auditor, lambda: self._stage.samples(micro_batch_id)) if ends else None
        directions = [one for one in Direction if 0 <= stage + _FROM[one] < self._mesh.stages]
        given = {
            direction: self._pass_on(
                plan.wiring.worker(stage + _FROM[direction], case.lane),
                auditor,
                partial(self._cache.sent.__getitem__, (direction, slot)),
            )
            for direction in directions
        }
        if auditor != self._worker:
            return None
        for direction, signal in given.items():
            boundary = Boundary(stage - (direction is Direction.ACTIVATION), direction)
            sent = commitments.sent_digest(SignalId(Kind.SIGNAL, boundary, case.lane, slot))
            if not isinstance(signal, Tensor) or sent is None or not sent.names(signal):
                return _WITHHELD[direction]
        return Inputs(batch, given.get(Direction.ACTIVATION), given.get(Direction.GRADIENT))

    def _pass_on(self, giver: Worker, auditor: Worker, item: Callable[[], Any]) -> Any:
        """Has one worker hand something to the auditor; returns it there."""
        if self._worker == auditor:
            return item() if giver == auditor else receive_tree(self._mesh.rank(giver), self._cache.room)
        if self._worker == giver:
            send_tree(item(), self._mesh.rank(auditor))
        return None

    def _recomputed(self, case: ContributionCase, micro_batch_id: MicroBatchId, given: Inputs) -> list[Tensor | None] | None:
        """The gradients of a micro-batch; ``None`` if no step can work on the samples that another worker gave."""
        if given.batch is None:
            return self._stage.gradients(micro_batch_id, given)
        try:
            batch = unpacked(given.batch, self._mesh.rank(case.audited))
            return self._stage.gradients(micro_batch_id, given._replace(batch=batch))
        except Exception as error:
            warnings.warn(
                f"The weight gradients of {case.audited} could not be audited with the samples that others gave for it"
                f" ({type(error).__name__}: {error}).",
                stacklevel=2,
            )
            return None


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other
