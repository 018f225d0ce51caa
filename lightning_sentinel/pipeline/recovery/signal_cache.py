"""The signals and notes that a worker sent and received in a step, kept for audits by recomputation."""

from __future__ import annotations

from torch import Tensor

from lightning_sentinel.mesh import Direction
from lightning_sentinel.verification.projection import Projection

__all__ = ["SignalCache"]


class SignalCache:
    """Keeps the signals of a step by direction and slot, until the step is settled.

    Attributes:
        sent: the signals that this worker sent.
        received: the signals that it received.
        notes_sent: the notes that it sent on signals of this direction.
        notes_received: the notes that it received with signals of this direction, on what their senders had received.
    """

    def __init__(self) -> None:
        self.sent: dict[tuple[Direction, int], Tensor] = {}
        self.received: dict[tuple[Direction, int], Tensor] = {}
        self.notes_sent: dict[tuple[Direction, int], Projection] = {}
        self.notes_received: dict[tuple[Direction, int], Projection] = {}
        self._keeps = False
        self._largest = 0

    def begin(self, keeps: bool) -> None:
        """Begin a step.

        Args:
            keeps: whether any of its signals may be audited.
        """
        self.clear()
        self._keeps = keeps

    def keep_sent(self, direction: Direction, slot: int, signal: Tensor) -> None:
        if self._keeps:
            self.sent[direction, slot] = signal.detach()

    def keep_received(self, direction: Direction, slot: int, signal: Tensor) -> None:
        if self._keeps:
            self.received[direction, slot] = signal.detach()

    def keep_note_sent(self, direction: Direction, slot: int, note: Projection) -> None:
        if self._keeps:
            self.notes_sent[direction, slot] = note

    def keep_note_received(self, direction: Direction, slot: int, note: Projection) -> None:
        if self._keeps:
            self.notes_received[direction, slot] = note

    def clear(self) -> None:
        self._largest = self.largest
        for kept in (self.sent, self.received, self.notes_sent, self.notes_received):
            kept.clear()

    @property
    def largest(self) -> int:
        """Bytes of the largest signal so far: a worker without a lane may be asked to recompute the signals of others."""
        kept = (*self.sent.values(), *self.received.values())
        return max([self._largest, *(signal.numel() * signal.element_size() for signal in kept)])

    @property
    def room(self) -> int:
        """Bytes that others may hand over at once: signals of other shapes, or samples, may be larger than what was seen."""
        return 64 * max(self.largest, 2**20)
