"""How an auditor examines what it audits: what it needs for that, who has to hand it over, and what it finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.data.sample_exchange import supplier, unpacked
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.trust.statements import Kind, SignalId
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.tolerance import Tolerances, deviation
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["Examination", "Examined", "Inputs", "Item", "Need", "SignalExamination", "signal_of"]


class Inputs(NamedTuple):
    """What a stage computed a signal from, as handed to an auditor.

    Args:
        batch: the samples, at the ends of the pipeline.
        activation: the activation that the audited worker received; ``None`` at the first stage.
        gradient: if the signal is a gradient, the gradient that the audited worker received; ``None`` at the last stage.
    """

    batch: Any
    activation: Tensor | None
    gradient: Tensor | None


class Item(IntEnum):
    """Something that is handed to an auditor."""

    BATCH = 0
    ACTIVATION = 1
    GRADIENT = 2
    CLAIMED = 3
    """The signal that is audited, from its receiver."""
    SIGNAL = 4
    """The signal that a row or a note is about."""
    NOTE = 5


class Need(NamedTuple):
    """An item that an auditor needs, and the worker that hands it over."""

    item: Item
    giver: Worker


class Examined(NamedTuple):
    """What an auditor has found in a case.

    Args:
        word: its vote, unless it has recomputed something.
        recomputed: on the device; ``None`` if nothing was recomputed.
        measured: how far that is from what was audited, ``(n,)`` on the device, the error first; ``None`` if it is compared on the
            host, or cannot be measured.
        compare: takes ``recomputed`` on the host, and returns the error; ``None`` if it is measured on the device.
        allowed: the error up to which both match.
    """

    word: Outcome
    recomputed: Tensor | None = None
    measured: Tensor | None = None
    compare: Callable[[Tensor], float] | None = None
    allowed: float = 0.0


class Examination(Protocol):
    """How cases of one kind are examined."""

    def needs(self, case: Case, plan: StepPlan) -> list[Need]:
        """The items that the auditor of a case needs, in the order in which they are sent."""

    def item(self, item: Item, case: Case) -> Any:
        """An item that this rank hands over."""

    def examine(self, case: Case, items: Mapping[Item, Any], commitments: StepCommitments) -> Examined:
        """What this rank finds in a case that it audits."""


def signal_of(case: Case) -> SignalId:
    """The signal that a case is about, or whose row it is about."""
    return SignalId(Kind.SIGNAL, case.boundary, case.lane, case.slot)


def _warn_of(audited: Worker, what: str) -> None:
    warnings.warn(f"A signal of {audited} could not be audited with what others gave for it: {what}.", stacklevel=2)


class SignalExamination:
    """Recomputes signals from what their senders received, and compares.

    The previous stage's worker hands over the activation that it sent, the next stage's worker the gradient that it sent, the
    receiver the claimed signal, and a worker that loaded the samples hands those over.

    Args:
        mesh: all workers.
        cache: the signals that this rank sent and received.
        samples: returns ``[batch, samples, weight]`` of one of this replica's micro-batches.
        recompute: returns the signal that an honest worker of this stage sends, from its direction, micro-batch and inputs.
        tolerances: the errors up to which signals match.
        computed_in: returns the dtype in which this worker's device multiplies float32.
    """

    def __init__(
        self,
        mesh: Mesh,
        cache: SignalCache,
        samples: Callable[[MicroBatchId], Any],
        recompute: Callable[[Direction, MicroBatchId, Inputs], Tensor],
        tolerances: Tolerances,
        computed_in: Callable[[], torch.dtype],
    ) -> None:
        self._mesh = mesh
        self._cache = cache
        self._samples = samples
        self.recompute = recompute
        self._tolerances = tolerances
        self._computed_in = computed_in

    def needs(self, case: Case, plan: StepPlan) -> list[Need]:
        boundary = case.boundary
        wiring = plan.wiring
        stage = boundary.sender
        last = self._mesh.stages - 1
        backward = boundary.direction is Direction.GRADIENT
        needs: list[Need] = []
        if stage == 0 or (backward and stage == last):
            needs.append(Need(Item.BATCH, supplier(case.micro_batch_id, stage, self._mesh, plan.absent, case.audited)))
        if stage > 0:
            needs.append(Need(Item.ACTIVATION, wiring.worker(stage - 1, case.lane)))
        if backward and stage < last:
            needs.append(Need(Item.GRADIENT, wiring.worker(stage + 1, case.lane)))
        return [*needs, Need(Item.CLAIMED, wiring.worker(boundary.receiver, case.lane))]

    def item(self, item: Item, case: Case) -> Any:
        cache = self._cache
        slot = case.slot
        if item is Item.BATCH:
            return self._samples(case.micro_batch_id)
        if item is Item.ACTIVATION:
            return cache.sent[Direction.ACTIVATION, slot]
        if item is Item.GRADIENT:
            return cache.sent[Direction.GRADIENT, slot]
        return cache.received[case.boundary.direction, slot]

    def examine(self, case: Case, items: Mapping[Item, Any], commitments: StepCommitments) -> Examined:
        """See :class:`Examination`.

        Where samples from another worker are unusable the rank warns, and the signal counts as matching: no digest vouches for
        samples, so no worker is blamed for them.
        """
        if Item.BATCH in items and not isinstance(items[Item.BATCH], list):
            _warn_of(case.audited, f"the batch is {type(items[Item.BATCH]).__name__}")
            return Examined(Outcome.MATCHES)
        withheld = self._withheld(case, items, commitments)
        if withheld is not None:
            return Examined(withheld)
        try:
            batch = unpacked(items[Item.BATCH], self._mesh.rank(case.audited)) if Item.BATCH in items else None
            honest = self.recompute(
                case.boundary.direction, case.micro_batch_id, Inputs(batch, items.get(Item.ACTIVATION), items.get(Item.GRADIENT))
            )
        except Exception as error:
            if Item.BATCH not in items:
                raise
            # The samples come from another worker, and may be such that no step can work on them.
            _warn_of(case.audited, f"no step can work on the samples ({type(error).__name__}: {error})")
            return Examined(Outcome.MATCHES)
        claimed = items[Item.CLAIMED].to(honest.device)
        if claimed.shape != honest.shape or self._falsely_tainted(case, honest, commitments):
            return Examined(Outcome.LIED, honest)
        index = self._mesh.boundaries.index(case.boundary)
        backward = case.boundary.direction is Direction.GRADIENT
        activation = items[Item.ACTIVATION].to(honest.device) if backward else None
        measured = deviation(claimed, honest, self._tolerances.seed_of(index), activation)
        allowed = self._tolerances.allowed(index, case.audited, honest.dtype, self._computed_in())
        return Examined(Outcome.MATCHES, honest, measured, allowed=allowed)

    def _withheld(self, case: Case, items: Mapping[Item, Any], commitments: StepCommitments) -> Outcome | None:
        """The vote if a worker hands over another signal than the one that was sent; ``None`` if all are what was sent."""
        stage = case.boundary.sender
        given = (
            (Item.CLAIMED, case.boundary, Outcome.SIGNAL_WITHHELD),
            (Item.ACTIVATION, Boundary(stage - 1, Direction.ACTIVATION), Outcome.ACTIVATION_WITHHELD),
            (Item.GRADIENT, Boundary(stage, Direction.GRADIENT), Outcome.GRADIENT_WITHHELD),
        )
        for item, boundary, outcome in given:
            sent = commitments.sent_digest(SignalId(Kind.SIGNAL, boundary, case.lane, case.slot))
            if item in items and not (isinstance(items[item], Tensor) and sent is not None and sent.names(items[item])):
                return outcome
        return None

    def _falsely_tainted(self, case: Case, honest: Tensor, commitments: StepCommitments) -> bool:
        """Whether the sender says without a reason that the micro-batch is left out, which keeps its signals from being judged.

        Where signals are audited the only reason is a step that returned no loss: the last stage then sends zeros, and the taint
        goes back through all stages. So the host waits for the device in a case that hardly ever comes.
        """
        if not commitments.is_tainted(signal_of(case)):
            return False
        stage = case.boundary.sender
        if case.boundary.direction is Direction.GRADIENT:
            if stage == self._mesh.stages - 1:
                return bool(honest.any())
            if commitments.is_tainted(SignalId(Kind.SIGNAL, Boundary(stage, Direction.GRADIENT), case.lane, case.slot)):
                return False
        before = SignalId(Kind.SIGNAL, Boundary(stage - 1, Direction.ACTIVATION), case.lane, case.slot)
        return stage == 0 or not commitments.is_tainted(before)
