"""Audits between processes: which workers hand evidence to an auditor, and how the auditor judges the signal from it.

Another worker of the stage recomputes the signal. The previous stage's worker hands it the activation that it sent, the next
stage's worker the gradient that it sent, the receiver the claimed signal, and a worker that loaded the samples hands those over.
All ranks go through the same list in the same order, so that no two ranks wait for each other.

The auditor checks an activation or gradient that it was handed against the digest of what the audited worker received. That worker
sends the digest itself: else its neighbour could have it blamed. Which workers are asked, and whose vote counts, the jury decides
(:mod:`lightning_sentinel.verification.jury`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.pipeline.data.sample_exchange import supplier, unpacked
from lightning_sentinel.pipeline.messages.tensor_trees import Packed, pack, pack_all, receive_tree, send_packed
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.waiting import on_host
from lightning_sentinel.trust.digests import Algorithm, digest_of_tensor
from lightning_sentinel.verification.audit import Outcome
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.tolerance import MEASURED, Tolerances, deviation
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["Audits", "Evidence", "digest"]

_WORDS = tuple(word for word in Outcome if word is not Outcome.DISPUTED)
"""The votes that one worker can cast."""


class Evidence(NamedTuple):
    """What a stage computed a signal from, as handed to an auditor.

    Args:
        batch: the samples, at the ends of the pipeline.
        activation: the activation that the audited worker received; ``None`` at the first stage.
        gradient: if the signal is a gradient, the gradient that the audited worker received; ``None`` at the last stage.
    """

    batch: Any
    activation: Tensor | None
    gradient: Tensor | None


def digest(signal: Tensor) -> str:
    """A fingerprint of a signal: of its bytes, and of its shape and dtype, because the same bytes can be another signal.

    Example:
        >>> digest(torch.ones(3)) == digest(torch.ones(3)), digest(torch.ones(3)) == digest(torch.zeros(3))
        (True, False)
    """
    return str(digest_of_tensor(signal, Algorithm.SHA256))


class _Item(IntEnum):
    BATCH = 0
    ACTIVATION = 1
    GRADIENT = 2
    CLAIMED = 3
    RECEIVED = 4


_Need = tuple[_Item, Worker]
"""An item that an auditor needs, and the worker that hands it over."""


class _Answer(NamedTuple):
    """An auditor's answer to a case.

    Args:
        word: its vote, unless it has recomputed the signal.
        measured: from :func:`deviation`, on the device; ``None`` if the signal was not recomputed.
        allowed: the error up to which the signal matches.
    """

    word: Outcome
    measured: Tensor | None = None
    allowed: float = 0.0


_KINDS = {_Item.BATCH: list, _Item.CLAIMED: Tensor, _Item.RECEIVED: dict}
"""Types of the items that no digest vouches for. An audited worker that cannot send its own digests counts as a liar."""


def _warn_of(audited: Worker, what: str) -> None:
    warnings.warn(f"A signal of {audited} could not be audited with what others gave for it: {what}.", stacklevel=2)


class Audits:
    """The audits that this rank takes part in.

    Args:
        mesh: all workers.
        worker: the worker that this rank is.
        cache: the signals that this rank sent and received.
        samples: returns ``[batch, samples, weight]`` of one of this replica's micro-batches.
        recompute: returns the signal that an honest worker of this stage sends, from its direction, micro-batch and evidence.
        tolerances: the errors up to which signals match.
        computed_in: returns the dtype in which this worker's device multiplies float32.
        device: where signals are.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        cache: SignalCache,
        samples: Callable[[MicroBatchId], Any],
        recompute: Callable[[Direction, MicroBatchId, Evidence], Tensor],
        tolerances: Tolerances,
        computed_in: Callable[[], torch.dtype],
        device: torch.device,
    ) -> None:
        self._mesh = mesh
        self._worker = worker
        self._cache = cache
        self._samples = samples
        self.recompute = recompute
        self._tolerances = tolerances
        self._computed_in = computed_in
        self._device = device
        self.adversary: Adversary | None = None
        """A simulated attacker, which may also lie in its votes."""

    def ask(self, asked: Sequence[tuple[Case, Worker]], plan: StepPlan) -> list[Outcome]:
        """Have workers recompute signals; to be called by all ranks.

        The host waits for the device twice: for all items that this rank hands over, and for the errors of all signals that it
        recomputes.

        Args:
            asked: the signals, those of a boundary in succession, and the worker that recomputes each.
            plan: the step's plan.

        Returns:
            the vote of each of these workers.
        """
        if not asked:
            return []
        needed = [self._needs(case, plan) for case, _ in asked]
        handed = self._handed(asked, needed)
        answers: list[_Answer | None] = []
        # One boundary at a time: no auditor holds more evidence than that of one boundary.
        for _, some in groupby(range(len(asked)), key=lambda number: asked[number][0].boundary):
            given = [(*asked[number], self._hand_over(*asked[number], needed[number], handed[number])) for number in some]
            answers += [self._judge(case, items) if auditor == self._worker else None for case, auditor, items in given]
        said = torch.zeros(len(asked), 1 + MEASURED)
        for number, (word, measured) in self._decided(answers).items():
            case, auditor = asked[number]
            direction = case.boundary.direction
            said[number, 0] = (
                word if self.adversary is None else self.adversary.vote(word, auditor, case.audited, direction, plan.number)
            )
            said[number, 1:] = measured
        everyone = world().all_gather(said)
        # Only the auditor's own entry counts for a case, whatever other ranks put there.
        values = [everyone[self._mesh.rank(auditor), number].tolist() for number, (_, auditor) in enumerate(asked)]
        words = [Outcome(int(value)) if value in _WORDS else Outcome.MATCHES for value, *_ in values]
        for word, (_, *numbers), (case, _) in zip(words, values, asked):
            if word == Outcome.MATCHES:
                self._tolerances.heard(self._mesh.boundaries.index(case.boundary), case.audited, numbers)
        return words

    def _handed(self, asked: Sequence[tuple[Case, Worker]], needed: Sequence[Sequence[_Need]]) -> list[dict[_Item, Packed]]:
        """The items that this rank sends to the auditor of each case, packed for sending."""
        wanted = [
            (number, item, self._item(item, asked[number][0]))
            for number, needs in enumerate(needed)
            for item, giver in needs
            if giver == self._worker != asked[number][1]
        ]
        handed: list[dict[_Item, Packed]] = [{} for _ in asked]
        for (number, item, held), packed in zip(wanted, pack_all(held for *_, held in wanted)):
            handed[number][item] = pack(dict(zip(held, map(digest, packed[1])))) if item is _Item.RECEIVED else packed
        return handed

    def _hand_over(self, case: Case, auditor: Worker, needs: Sequence[_Need], handed: dict[_Item, Packed]) -> dict[_Item, Any]:
        """Send or receive the items that an auditor needs. Returns them on the auditor's rank."""
        items: dict[_Item, Any] = {}
        for item, giver in needs:
            if item in handed:
                send_packed(handed[item], self._mesh.rank(auditor))
            elif giver == auditor == self._worker:
                items[item] = self._item(item, case)
            elif auditor == self._worker:
                items[item] = receive_tree(self._mesh.rank(giver), self._room)
        return items

    @property
    def _room(self) -> int:
        return 64 * max(self._cache.largest, 2**20)

    def _needs(self, case: Case, plan: StepPlan) -> list[_Need]:
        """The items that the auditor of a case needs, in the order in which they are sent."""
        boundary = case.boundary
        wiring = plan.wiring
        stage = boundary.sender
        last = self._mesh.stages - 1
        backward = boundary.direction is Direction.GRADIENT
        needs: list[_Need] = []
        if stage == 0 or (backward and stage == last):
            needs.append((_Item.BATCH, supplier(case.micro_batch_id, stage, self._mesh, plan.absent, case.audited)))
        if stage > 0:
            needs.append((_Item.ACTIVATION, wiring.worker(stage - 1, case.lane)))
        if backward and stage < last:
            needs.append((_Item.GRADIENT, wiring.worker(stage + 1, case.lane)))
        return [*needs, (_Item.CLAIMED, wiring.worker(boundary.receiver, case.lane)), (_Item.RECEIVED, case.audited)]

    def _item(self, item: _Item, case: Case) -> Any:
        cache = self._cache
        slot = case.slot
        if item is _Item.BATCH:
            return self._samples(case.micro_batch_id)
        if item is _Item.ACTIVATION:
            return cache.sent[Direction.ACTIVATION, slot]
        if item is _Item.GRADIENT:
            return cache.sent[Direction.GRADIENT, slot]
        if item is _Item.CLAIMED:
            return cache.received[case.boundary.direction, slot]
        found = {direction: cache.received.get((direction, slot)) for direction in Direction}
        return {direction.value: signal for direction, signal in found.items() if signal is not None}

    def _judge(self, case: Case, items: dict[_Item, Any]) -> _Answer:
        """This rank's vote on a signal, or the signal's error against the recomputed one.

        Where evidence from other workers is unusable the rank warns, and the signal counts as matching: no worker is blamed for it.
        """
        untold = [item for item, kind in _KINDS.items() if item in items and not isinstance(items[item], kind)]
        for item in untold:
            _warn_of(case.audited, f"the {item.name.lower()} is {type(items[item]).__name__}")
        if untold:
            return _Answer(Outcome.LIED if _Item.RECEIVED in untold else Outcome.MATCHES)
        digests = items[_Item.RECEIVED]
        given = (
            (_Item.ACTIVATION, Direction.ACTIVATION, Outcome.ACTIVATION_WITHHELD),
            (_Item.GRADIENT, Direction.GRADIENT, Outcome.GRADIENT_WITHHELD),
        )
        for item, direction, outcome in given:
            if item in items and not self._is(items[item], digests.get(direction.value)):
                return _Answer(outcome)
        activation, gradient = (self._on_device(items.get(item)) for item in (_Item.ACTIVATION, _Item.GRADIENT))
        try:
            batch = unpacked(items[_Item.BATCH], self._mesh.rank(case.audited)) if _Item.BATCH in items else None
            batch = apply_to_collection(batch, Tensor, self._on_device)
            honest = self.recompute(case.boundary.direction, case.micro_batch_id, Evidence(batch, activation, gradient))
        except Exception as error:
            if _Item.BATCH not in items:
                raise
            # The samples come from another worker, and may be such that no step can work on them.
            _warn_of(case.audited, f"no step can work on the samples ({type(error).__name__}: {error})")
            return _Answer(Outcome.MATCHES)
        claimed = items[_Item.CLAIMED].to(honest.device)
        if claimed.shape != honest.shape:
            return _Answer(Outcome.LIED)
        index = self._mesh.boundaries.index(case.boundary)
        measured = deviation(claimed, honest, self._tolerances.seed_of(index))
        allowed = self._tolerances.allowed(index, case.audited, honest.dtype, self._computed_in())
        return _Answer(Outcome.MATCHES, measured, allowed)

    @staticmethod
    def _decided(answers: Sequence[_Answer | None]) -> dict[int, tuple[Outcome, Tensor]]:
        """Maps the number of each case that this rank audits to its vote and the measured error."""
        mine = {number: answer for number, answer in enumerate(answers) if answer is not None}
        measured = {number: answer.measured for number, answer in mine.items() if answer.measured is not None}
        (found,) = on_host([torch.stack(list(measured.values()))]) if measured else (torch.empty(0),)
        decided = {number: (answer.word, torch.full((MEASURED,), torch.nan)) for number, answer in mine.items()}
        for number, values in zip(measured, found):
            decided[number] = Outcome.LIED if bool(values[0] > mine[number].allowed) else Outcome.MATCHES, values
        return decided

    @staticmethod
    def _is(given: Any, fingerprint: str | None) -> bool:
        return isinstance(given, Tensor) and digest(given) == fingerprint

    def _on_device(self, signal: Tensor | None) -> Tensor | None:
        return None if signal is None else signal.to(self._device)
