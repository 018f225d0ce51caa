"""Audits of weight gradients between processes: an auditor recomputes all that a worker added to its stage's in a step.

As for a signal (:mod:`lightning_sentinel.pipeline.recovery.auditing`) the auditor gets what the worker had received from those that
sent it, compared with the worker's own digests: of all of its micro-batches, one after another. It adds up the gradients of its
own backward passes, and compares the sketch of the sum with the one in the step's table, which all ranks have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.pipeline.data.sample_exchange import supplier, unpacked
from lightning_sentinel.pipeline.messages.tensor_trees import receive_tree, send_tree
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.recovery.auditing import Audits, Evidence, digest
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.waiting import on_host
from lightning_sentinel.verification.audit import Outcome, tolerance
from lightning_sentinel.verification.jury import ContributionCase
from lightning_sentinel.verification.sketches import sketch_error
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["AuditsOfProcess", "ContributionAudits", "StageRecomputation"]

_WORDS = tuple(word for word in Outcome if word is not Outcome.DISPUTED)
_WITHHELD = {Direction.ACTIVATION: Outcome.ACTIVATION_WITHHELD, Direction.GRADIENT: Outcome.GRADIENT_WITHHELD}
_FROM = {Direction.ACTIVATION: -1, Direction.GRADIENT: 1}
"""The stage, from that of the audited worker, that sent it a signal of this direction."""


class StageRecomputation(NamedTuple):
    """Recomputes weight gradients of this rank's stage.

    Args:
        samples: returns ``[batch, samples, weight]`` of one of this replica's micro-batches.
        gradients: returns the gradients that an honest worker adds for a micro-batch, from its evidence.
        sketch: returns the sketch of gradients of the stage, in the units of the step's table.
        computed_in: returns the dtype in which this worker's device multiplies float32.
    """

    samples: Callable[[MicroBatchId], Any]
    gradients: Callable[[MicroBatchId, Evidence], list[Tensor | None]]
    sketch: Callable[[Sequence[Tensor | None]], Tensor]
    computed_in: Callable[[], torch.dtype]


class ContributionAudits:
    """The audits of weight gradients that this rank takes part in.

    Args:
        mesh: all workers.
        worker: the worker that this rank is.
        cache: the signals that this rank sent and received.
        stage: recomputes weight gradients.
        device: where signals are.
    """

    def __init__(self, mesh: Mesh, worker: Worker, cache: SignalCache, stage: StageRecomputation, device: torch.device) -> None:
        self._mesh = mesh
        self._worker = worker
        self._cache = cache
        self._stage = stage
        self._device = device
        self.adversary: Adversary | None = None
        """A simulated attacker, which may also lie in its votes."""

    def ask(self, asked: Sequence[tuple[ContributionCase, Worker]], plan: StepPlan, sketches: Tensor) -> list[Outcome]:
        """Have workers recompute contributions; to be called by all ranks.

        Args:
            asked: the contributions, and the worker that recomputes each.
            plan: the step's plan.
            sketches: ``(stages, replicas, SKETCHED)``, of the contributions, from the step's table.

        Returns:
            the vote of each of these workers.
        """
        if not asked:
            return []
        said = torch.zeros(len(asked))
        for number, (case, auditor) in enumerate(asked):
            # All ranks go through all cases and micro-batches in the same order, so that no two wait for each other.
            word = self._heard(case, auditor, plan, sketches)
            if word is not None:
                said[number] = word if self.adversary is None else self.adversary.vote(auditor, case.audited, word)
        everyone = world().all_gather(said)
        # Only the auditor's own entry counts for a case, whatever other ranks put there.
        values = [float(everyone[self._mesh.rank(auditor), number]) for number, (_, auditor) in enumerate(asked)]
        return [Outcome(int(value)) if value in _WORDS else Outcome.MATCHES for value in values]

    def _heard(self, case: ContributionCase, auditor: Worker, plan: StepPlan, sketches: Tensor) -> Outcome | None:
        """This rank's vote on a case; ``None`` on other ranks than the auditor's, which hand over what they have."""
        samples = plan.sizes.samples
        work = [one for one in plan.wiring.work[case.lane] if samples[one.replica]]
        total: list[Tensor | None] | None = None
        vote: Outcome | None = None
        for slot, micro_batch_id in enumerate(work):
            evidence = self._handed(case, auditor, slot, micro_batch_id, plan)
            # An auditor that has made up its mind still receives what the others send it.
            if evidence is None or vote is not None:
                continue
            if isinstance(evidence, Outcome):
                vote = evidence
                continue
            found = self._recomputed(case, micro_batch_id, evidence)
            if found is None:
                vote = Outcome.MATCHES
            else:
                total = found if total is None else [_added(*both) for both in zip(total, found)]
        if auditor != self._worker or vote is not None:
            return vote
        dtype = next((one.dtype for one in total or () if one is not None), torch.float32)
        (sketch,) = on_host([self._stage.sketch(total or [])])
        error = sketch_error(sketches[case.audited.stage, case.audited.replica], sketch)
        return Outcome.LIED if float(error) > tolerance(dtype, self._stage.computed_in()) else Outcome.MATCHES

    def _handed(
        self, case: ContributionCase, auditor: Worker, slot: int, micro_batch_id: MicroBatchId, plan: StepPlan
    ) -> Evidence | Outcome | None:
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
        digests = self._pass_on(case.audited, auditor, lambda: self._digests(slot))
        if auditor != self._worker:
            return None
        if not isinstance(digests, dict):
            # A worker that cannot say what it had received counts as a liar.
            return Outcome.LIED
        for direction, signal in given.items():
            if not isinstance(signal, Tensor) or digest(signal) != digests.get(direction.value):
                return _WITHHELD[direction]
        signals = {direction: signal.to(self._device) for direction, signal in given.items()}
        return Evidence(batch, signals.get(Direction.ACTIVATION), signals.get(Direction.GRADIENT))

    def _pass_on(self, giver: Worker, auditor: Worker, item: Callable[[], Any]) -> Any:
        """Has one worker hand something to the auditor; returns it there."""
        if self._worker == auditor:
            return item() if giver == auditor else receive_tree(self._mesh.rank(giver), self._room)
        if self._worker == giver:
            send_tree(item(), self._mesh.rank(auditor))
        return None

    @property
    def _room(self) -> int:
        return 64 * max(self._cache.largest, 2**20)

    def _digests(self, slot: int) -> dict[str, str]:
        held = {direction: self._cache.received.get((direction, slot)) for direction in Direction}
        return {direction.value: digest(signal) for direction, signal in held.items() if signal is not None}

    def _recomputed(self, case: ContributionCase, micro_batch_id: MicroBatchId, evidence: Evidence) -> list[Tensor | None] | None:
        """The gradients of a micro-batch; ``None`` if no step can work on the samples that another worker gave."""
        if evidence.batch is None:
            return self._stage.gradients(micro_batch_id, evidence)
        try:
            batch = unpacked(evidence.batch, self._mesh.rank(case.audited))
            batch = apply_to_collection(batch, Tensor, lambda one: one.to(self._device))
            return self._stage.gradients(micro_batch_id, evidence._replace(batch=batch))
        except Exception as error:
            warnings.warn(
                f"The weight gradients of {case.audited} could not be audited with the samples that others gave for it"
                f" ({type(error).__name__}: {error}).",
                stacklevel=2,
            )
            return None


class AuditsOfProcess(NamedTuple):
    """The audits that a rank takes part in.

    Args:
        signals: of signals.
        contributions: of weight gradients.
    """

    signals: Audits
    contributions: ContributionAudits


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other
