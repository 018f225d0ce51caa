"""Audits between processes: who gives an auditor what it needs, and what the auditor makes of it.

A signal is recomputed by another worker of the stage. The worker before gives it the input, as it was sent; the one behind the
gradient that a gradient follows from; the receiver the claimed signal; samples come from a worker that loaded them. All ranks go
through the same list in the same order, so that nobody waits for somebody who waits.

Whether the auditor was given what the audited worker had been sent is checked against a digest that the audited worker's receiving
side gives: else its neighbour could have it blamed. Who is asked, and whose word counts, is for the jury to say
(:mod:`lightning_sentinel.verification.jury`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.data.supply import supplier
from lightning_sentinel.pipeline.messages.parcels import receive_parcel, send_parcel
from lightning_sentinel.verification.audit import Outcome, relative_error
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.wiring import Part, Wiring

__all__ = ["Audits", "Evidence", "Kept", "digest"]

_WORDS = tuple(word for word in Outcome if word is not Outcome.DISPUTED)
"""What one worker can say."""


class Evidence(NamedTuple):
    """What an auditor was given.

    Args:
        batch: the samples, at the ends of the pipeline.
        weight: their share of the replica's batch.
        samples: how many.
        activation: what the audited worker had been sent; ``None`` at the first stage.
        gradient: the same going backward, of a gradient; ``None`` at the last stage.
    """

    batch: Any
    samples: int
    weight: float
    activation: Tensor | None
    gradient: Tensor | None


@dataclass
class Kept:
    """What a worker sent and received in a step, by direction and slot, until the step is settled."""

    sent: dict[tuple[Direction, int], Tensor] = field(default_factory=dict)
    received: dict[tuple[Direction, int], Tensor] = field(default_factory=dict)
    _largest: int = 0
    keeps: bool = False
    """Whether anything may be audited."""

    def keep(self, where: dict[tuple[Direction, int], Tensor], direction: Direction, slot: int, signal: Tensor) -> None:
        if self.keeps:
            where[direction, slot] = signal.detach()

    def clear(self) -> None:
        self._largest = self.bytes
        self.sent.clear()
        self.received.clear()

    @property
    def bytes(self) -> int:
        """Of the largest signal so far: who has nothing to do in a step may be asked to recompute the signals of others."""
        kept = (*self.sent.values(), *self.received.values())
        return max([self._largest, *(signal.numel() * signal.element_size() for signal in kept)])


def digest(signal: Tensor) -> str:
    """A fingerprint of a signal: its shape and dtype, because the same bytes can be another signal, and its bytes.

    Example:
        >>> digest(torch.ones(3)) == digest(torch.ones(3)), digest(torch.ones(3)) == digest(torch.zeros(3))
        (True, False)
    """
    data = signal.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{signal.dtype} {tuple(signal.shape)} ".encode() + data).hexdigest()


class _Item(IntEnum):
    BATCH = 0
    ACTIVATION = 1
    GRADIENT = 2
    CLAIMED = 3
    RECEIVED = 4


class Audits:
    """The audits that this rank takes part in.

    Args:
        mesh: all workers.
        worker: that this rank is.
        kept: what this rank sent and received.
        samples: gives ``[batch, samples, weight]`` of one of this replica's micro-batches.
        recompute: what an honest worker of this stage sends: direction, part and evidence to a signal.
        tolerance: the relative error up to which a signal counts as recomputed.
        device: where signals are.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        kept: Kept,
        samples: Callable[[Part], Any],
        recompute: Callable[[Direction, Part, Evidence], Tensor],
        tolerance: Callable[[Tensor], float],
        device: torch.device,
    ) -> None:
        self._mesh, self._worker, self._kept = mesh, worker, kept
        self._samples, self._recompute, self._tolerance = samples, recompute, tolerance
        self._device = device
        self.adversary: Adversary | None = None
        """A simulated attacker, who may also lie about what it recomputed."""

    def ask(
        self, boundary: Boundary, asked: Sequence[tuple[Case, Worker]], wiring: Wiring, absent: Collection[Worker]
    ) -> list[Outcome]:
        """Have workers recompute signals of a boundary; to be called by all ranks.

        Args:
            boundary: that the signals crossed.
            asked: which of them, and who recomputes each.
            wiring: who served which lane.
            absent: workers that hand out no samples.

        Returns:
            what each of them says.
        """
        if not asked:
            return []
        given = [self._hand_over(boundary, case, auditor, wiring, absent) for case, auditor in asked]
        said = torch.zeros(len(asked))
        for number, ((case, auditor), items) in enumerate(zip(asked, given)):
            if auditor == self._worker:
                word = self._judge(boundary, case, items)
                said[number] = word if self.adversary is None else self.adversary.vote(auditor, case.audited, word)
        everyone = torch.empty(self._mesh.size, len(asked))
        dist.all_gather(list(everyone.unbind()), said)
        # Each case is for its auditor to say, whatever others put there.
        values = [float(everyone[self._mesh.rank(auditor), number]) for number, (_, auditor) in enumerate(asked)]
        return [Outcome(int(value)) if value in _WORDS else Outcome.MATCHES for value in values]

    def _hand_over(
        self, boundary: Boundary, case: Case, auditor: Worker, wiring: Wiring, absent: Collection[Worker]
    ) -> dict[_Item, Any]:
        """Bring an auditor what it needs; returns it on the auditor's rank."""
        items: dict[_Item, Any] = {}
        for item, giver in self._needs(boundary, case, wiring, absent):
            if giver == auditor == self._worker:
                items[item] = self._item(item, boundary, case)
            elif giver == self._worker:
                send_parcel(self._item(item, boundary, case), self._mesh.rank(auditor))
            elif auditor == self._worker:
                items[item] = receive_parcel(self._mesh.rank(giver), self._room)
        return items

    @property
    def _room(self) -> int:
        return 64 * max(self._kept.bytes, 2**20)

    def _needs(self, boundary: Boundary, case: Case, wiring: Wiring, absent: Collection[Worker]) -> list[tuple[_Item, Worker]]:
        """What an auditor needs, and who gives it."""
        stage, last = boundary.sender, self._mesh.stages - 1
        backward = boundary.direction is Direction.GRADIENT
        needs = []
        if stage == 0 or (backward and stage == last):
            needs.append((_Item.BATCH, supplier(case.part, stage, self._mesh, absent, case.audited)))
        if stage > 0:
            needs.append((_Item.ACTIVATION, wiring.worker(stage - 1, case.lane)))
        if backward and stage < last:
            needs.append((_Item.GRADIENT, wiring.worker(stage + 1, case.lane)))
        return [*needs, (_Item.CLAIMED, wiring.worker(boundary.receiver, case.lane)), (_Item.RECEIVED, case.audited)]

    def _item(self, item: _Item, boundary: Boundary, case: Case) -> Any:
        kept, slot = self._kept, case.slot
        if item is _Item.BATCH:
            return self._samples(case.part)
        if item is _Item.ACTIVATION:
            return kept.sent[Direction.ACTIVATION, slot]
        if item is _Item.GRADIENT:
            return kept.sent[Direction.GRADIENT, slot]
        if item is _Item.CLAIMED:
            return kept.received[boundary.direction, slot]
        found = {direction: kept.received.get((direction, slot)) for direction in Direction}
        return {direction.value: digest(signal) for direction, signal in found.items() if signal is not None}

    def _judge(self, boundary: Boundary, case: Case, items: dict[_Item, Any]) -> Outcome:
        """What this rank says of a signal."""
        digests = items[_Item.RECEIVED]
        given = (
            (_Item.ACTIVATION, Direction.ACTIVATION, Outcome.ACTIVATION_WITHHELD),
            (_Item.GRADIENT, Direction.GRADIENT, Outcome.GRADIENT_WITHHELD),
        )
        for item, direction, outcome in given:
            if item in items and not self._is(items[item], digests.get(direction.value)):
                return outcome
        batch, samples, weight = items.get(_Item.BATCH, (None, 0, 0.0))
        batch = apply_to_collection(batch, Tensor, self._on_device)
        activation, gradient = (self._on_device(items.get(item)) for item in (_Item.ACTIVATION, _Item.GRADIENT))
        evidence = Evidence(batch, samples, weight, activation, gradient)
        honest = self._recompute(boundary.direction, case.part, evidence)
        claimed = items[_Item.CLAIMED].to(honest.device)
        if claimed.shape != honest.shape or bool(relative_error(claimed, honest) > self._tolerance(honest)):
            return Outcome.LIED
        return Outcome.MATCHES

    @staticmethod
    def _is(given: Any, fingerprint: str | None) -> bool:
        return isinstance(given, Tensor) and digest(given) == fingerprint

    def _on_device(self, signal: Tensor | None) -> Tensor | None:
        return None if signal is None else signal.to(self._device)
