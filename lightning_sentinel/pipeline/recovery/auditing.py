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
import warnings
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
from lightning_sentinel.pipeline.data.supply import supplier, unpacked
from lightning_sentinel.pipeline.messages.parcels import receive_parcel, send_parcel
from lightning_sentinel.verification.audit import Outcome
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.tolerance import MEASURED, Tolerances, deviation
from lightning_sentinel.wiring import Part, Wiring

__all__ = ["Audits", "Evidence", "Kept", "digest"]

_WORDS = tuple(word for word in Outcome if word is not Outcome.DISPUTED)
"""What one worker can say."""


class Evidence(NamedTuple):
    """What an auditor was given.

    Args:
        batch: the samples, at the ends of the pipeline.
        activation: what the audited worker had been sent; ``None`` at the first stage.
        gradient: the same going backward, of a gradient; ``None`` at the last stage.
    """

    batch: Any
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


_KINDS = {_Item.BATCH: list, _Item.CLAIMED: Tensor, _Item.RECEIVED: dict}
"""What is asked of others without a fingerprint; who is audited and cannot say what it was sent has nothing to say for itself."""


def _warn_of(audited: Worker, what: str) -> None:
    warnings.warn(f"A signal of {audited} could not be audited with what others gave for it: {what}.", stacklevel=2)


class Audits:
    """The audits that this rank takes part in.

    Args:
        mesh: all workers.
        worker: that this rank is.
        kept: what this rank sent and received.
        samples: gives ``[batch, samples, weight]`` of one of this replica's micro-batches.
        recompute: what an honest worker of this stage sends: direction, part and evidence to a signal.
        tolerances: the errors up to which signals count as recomputed.
        computed_in: what float32 is multiplied in where this worker computes.
        device: where signals are.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        kept: Kept,
        samples: Callable[[Part], Any],
        recompute: Callable[[Direction, Part, Evidence], Tensor],
        tolerances: Tolerances,
        computed_in: Callable[[], torch.dtype],
        device: torch.device,
    ) -> None:
        self._mesh, self._worker, self._kept = mesh, worker, kept
        self._samples, self._recompute = samples, recompute
        self._tolerances, self._computed_in = tolerances, computed_in
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
        index = self._mesh.boundaries.index(boundary)
        said = torch.zeros(len(asked), 1 + MEASURED)
        for number, ((case, auditor), items) in enumerate(zip(asked, given)):
            if auditor == self._worker:
                word, measured = self._judge(boundary, case, items)
                said[number, 0] = word if self.adversary is None else self.adversary.vote(auditor, case.audited, word)
                said[number, 1:] = measured
        everyone = torch.empty(self._mesh.size, *said.shape)
        dist.all_gather(list(everyone.unbind()), said)
        # Each case is for its auditor to say, whatever others put there.
        values = [everyone[self._mesh.rank(auditor), number].tolist() for number, (_, auditor) in enumerate(asked)]
        words = [Outcome(int(value)) if value in _WORDS else Outcome.MATCHES for value, *_ in values]
        for word, (_, *numbers), (case, _) in zip(words, values, asked):
            if word == Outcome.MATCHES:
                self._tolerances.heard(index, case.audited, numbers)
        return words

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

    def _judge(self, boundary: Boundary, case: Case, items: dict[_Item, Any]) -> tuple[Outcome, Tensor]:
        """What this rank says of a signal, and how far it is from what it was recomputed to be.

        Where it was not given what it takes it says so, and nobody is blamed for the signal.
        """
        unknown = torch.full((MEASURED,), torch.nan)
        untold = [item for item, kind in _KINDS.items() if item in items and not isinstance(items[item], kind)]
        for item in untold:
            _warn_of(case.audited, f"the {item.name.lower()} is {type(items[item]).__name__}")
        if untold:
            return Outcome.LIED if _Item.RECEIVED in untold else Outcome.MATCHES, unknown
        digests = items[_Item.RECEIVED]
        given = (
            (_Item.ACTIVATION, Direction.ACTIVATION, Outcome.ACTIVATION_WITHHELD),
            (_Item.GRADIENT, Direction.GRADIENT, Outcome.GRADIENT_WITHHELD),
        )
        for item, direction, outcome in given:
            if item in items and not self._is(items[item], digests.get(direction.value)):
                return outcome, unknown
        activation, gradient = (self._on_device(items.get(item)) for item in (_Item.ACTIVATION, _Item.GRADIENT))
        try:
            batch = unpacked(items[_Item.BATCH], self._mesh.rank(case.audited)) if _Item.BATCH in items else None
            batch = apply_to_collection(batch, Tensor, self._on_device)
            honest = self._recompute(boundary.direction, case.part, Evidence(batch, activation, gradient))
        except Exception as error:
            if _Item.BATCH not in items:
                raise
            # Samples of another worker can be such that no step can work on them.
            _warn_of(case.audited, f"no step can work on the samples ({type(error).__name__}: {error})")
            return Outcome.MATCHES, unknown
        claimed = items[_Item.CLAIMED].to(honest.device)
        if claimed.shape != honest.shape:
            return Outcome.LIED, unknown
        index = self._mesh.boundaries.index(boundary)
        measured = deviation(claimed, honest, self._tolerances.seed_of(index))
        allowed = self._tolerances.allowed(index, case.audited, honest.dtype, self._computed_in())
        return Outcome.LIED if bool(measured[0] > allowed) else Outcome.MATCHES, measured

    @staticmethod
    def _is(given: Any, fingerprint: str | None) -> bool:
        return isinstance(given, Tensor) and digest(given) == fingerprint

    def _on_device(self, signal: Tensor | None) -> Tensor | None:
        return None if signal is None else signal.to(self._device)
