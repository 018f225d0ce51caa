"""The boundaries of one worker's stage: sends, receives, tampers with and verifies signals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.pipeline.commitments.recorder import Recorder
from lightning_sentinel.pipeline.local_worker import LocalWorker
from lightning_sentinel.pipeline.messages.headers import NOTES, NOTHING, SIGNALS, MessageId
from lightning_sentinel.pipeline.messages.inbox import Inbox
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.running_step import RunningStep
from lightning_sentinel.pipeline.step_checks import input_gradient
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.statements import Kind, SignalId

__all__ = ["Buffers", "StageBoundaries"]

Buffers = dict[str, list[Any]]
"""A schedule's buffers, by kind and number: ``inputs`` and ``outputs`` of the stage, ``output_tensors`` (the gradients of its
outputs), and ``taints``, 0-dim bools that say whether the micro-batch is left out."""


class StageBoundaries:
    """The schedule's instructions that send, receive, tamper with and verify signals; :class:`StageComputation` has the others.

    Args:
        local: the worker of this process.
        transport: sends signals and notes.
        inbox: receives signals and notes.
        cache: keeps signals until the step is settled.
        recorder: records messages, so that this worker can be held to what it says about them.
        buffers: the schedule's buffers.
    """

    def __init__(
        self,
        local: LocalWorker,
        transport: Transport,
        inbox: Inbox,
        cache: SignalCache,
        recorder: Recorder,
        buffers: Buffers,
    ) -> None:
        self._local = local
        self._transport = transport
        self._inbox = inbox
        self._cache = cache
        self._recorder = recorder
        self._buffers = buffers
        self._altered: Tensor | None = None
        """The next signal to send, as a simulated attacker has altered it."""

    def begin(self, plan: StepPlan) -> None:
        """Begin a step: before its schedule runs."""
        guard = self._local.guard
        self._cache.begin(keeps=plan.audited)
        self._recorder.begin(plan)
        replaces = plan.trains and guard is not None and guard.replaces_malformed
        self._inbox.begin(replaces, lets_nothing_in=not plan.trains)

    def finish(self, seal: Digest | None) -> bytes:
        """Wait until the notes of a step have been sent: after its schedule has run.

        Args:
            seal: of what this worker has drawn for the step.

        Returns:
            this worker's part of the step's commitments.
        """
        self._transport.finish_notes()
        return self._recorder.finish(seal)

    def forget(self) -> None:
        """Free the memory of the step's signals, once no audit needs them any more."""
        self._cache.clear()

    def receive_activation(self, running: RunningStep, buffer_id: int, slot: int) -> None:
        sender = self._peer(running, self._local.stage - 1)
        message_id = MessageId(running.plan.run, slot, SIGNALS[Direction.ACTIVATION])
        signal, tainted = self._inbox.activation(sender, message_id, running.work[slot].samples)
        if signal is not None:
            self._keep_received(running, Direction.ACTIVATION, slot, signal, tainted)
            signal.requires_grad_()
        self._buffers["inputs"][buffer_id] = signal
        self._buffers["taints"][buffer_id] = tainted

    def receive_gradient(self, running: RunningStep, buffer_id: int, slot: int) -> None:
        output = self._buffers["outputs"][buffer_id]
        sender = self._peer(running, self._local.stage + 1)
        signal, tainted = self._inbox.gradient(sender, MessageId(running.plan.run, slot, SIGNALS[Direction.GRADIENT]), output)
        self._keep_received(running, Direction.GRADIENT, slot, signal, tainted)
        self._buffers["output_tensors"][buffer_id] = signal
        # A micro-batch that was left out on its way forward stays left out, whatever the gradient's taint is.
        self._buffers["taints"][buffer_id] = tainted | self._buffers["taints"][buffer_id]

    def _keep_received(self, running: RunningStep, direction: Direction, slot: int, signal: Tensor, tainted: Tensor) -> None:
        self._cache.keep_received(direction, slot, signal)
        boundary = Boundary(self._local.stage - (direction is Direction.ACTIVATION), direction)
        # Who received no usable message says so by not saying what it received.
        if not self._inbox.is_replaced(MessageId(running.plan.run, slot, SIGNALS[direction])):
            sender = self._local.mesh.worker(self._peer(running, boundary.sender))
            said = self._local.commitment(signal, sender, direction, running.plan.number, slot)
            self._recorder.received(SignalId(Kind.SIGNAL, boundary, self._lane(running), slot), said, tainted)

    def verify_activation(self, running: RunningStep, buffer_id: int, slot: int) -> None:
        signal = self._buffers["inputs"][buffer_id].detach()
        self._buffers["inputs"][buffer_id] = self._verified(running, Direction.ACTIVATION, signal, buffer_id, slot).requires_grad_()

    def verify_gradient(self, running: RunningStep, buffer_id: int, slot: int) -> None:
        signal = self._buffers["output_tensors"][buffer_id]
        self._buffers["output_tensors"][buffer_id] = self._verified(running, Direction.GRADIENT, signal, buffer_id, slot)

    def _verified(self, running: RunningStep, direction: Direction, signal: Tensor, buffer_id: int, slot: int) -> Tensor:
        guard = self._local.guard
        if guard is None:
            return signal
        boundary = Boundary(self._local.stage - (direction is Direction.ACTIVATION), direction)
        before = self._local.mesh.before(boundary)
        note = None
        if before is not None and guard.compares_inputs:
            note = self._inbox.note(self._peer(running, before.sender), MessageId(running.plan.run, slot, NOTES[direction]))
            if running.plan.audited:
                self._cache.keep_note_received(direction, slot, note)
                self._recorder.received(SignalId(Kind.NOTE, before, self._lane(running), slot), note.whole)
        sender = self._local.mesh.worker(self._peer(running, boundary.sender))
        report = self._local.report(boundary, sender, running.plan.number, slot)
        signal, tainted = guard.receive(boundary, signal, self._buffers["taints"][buffer_id].view(1), note, report=report)
        self._buffers["taints"][buffer_id] = tainted[0]
        return signal

    def tamper(self, running: RunningStep, direction: Direction, received: Tensor | None, buffer_id: int, slot: int) -> None:
        """Let a simulated attacker alter the next signal to send.

        Args:
            received: the stage's input of the same direction, from which the signal was computed.
        """
        adversary = self._local.adversary
        worker = self._local.worker
        if adversary is not None and worker in adversary.workers:
            signal = self._outgoing(direction, buffer_id)
            self._altered = adversary.tamper(signal, worker, direction, running.plan.number, slot, received)

    def send(self, running: RunningStep, direction: Direction, buffer_id: int, slot: int) -> None:
        """Send a signal to the neighbour, and a note on it to the worker beyond the neighbour."""
        local = self._local
        taint = self._buffers["taints"][buffer_id]
        message_id = MessageId(running.plan.run, slot, SIGNALS[direction])
        if direction is Direction.ACTIVATION and self._buffers["outputs"][buffer_id] is None:
            self._transport.send(torch.empty(0), taint, self._peer(running, local.stage + 1), message_id, NOTHING)
            return
        # The attacker alters a copy: this stage's backward pass starts from the tensor itself.
        signal = self._outgoing(direction, buffer_id) if self._altered is None else self._altered
        self._altered = None
        self._cache.keep_sent(direction, slot, signal)
        boundary = Boundary(local.stage - (direction is Direction.GRADIENT), direction)
        receiver = self._peer(running, boundary.receiver)
        said = local.commitment(signal, local.mesh.worker(receiver), direction, running.plan.number, slot)
        self._recorder.sent(SignalId(Kind.SIGNAL, boundary, self._lane(running), slot), said, taint)
        is_new_shape = direction is Direction.ACTIVATION and self._inbox.is_new_shape(slot)
        self._transport.send(signal, taint, receiver, message_id, is_new_shape)
        if running.plan.trains:
            self._send_note(running, boundary, signal, slot)

    def _send_note(self, running: RunningStep, boundary: Boundary, signal: Tensor, slot: int) -> None:
        local = self._local
        after = self._local.mesh.after(boundary)
        note = None if local.guard is None or after is None else local.guard.project(after, signal)
        if note is None or after is None:
            return
        if local.adversary is not None:
            neighbour = self._local.mesh.worker(self._peer(running, boundary.receiver))
            told = local.adversary.note(note.values, local.worker, neighbour, boundary.direction, running.plan.number, slot)
            note = note._replace(values=told)
        if running.plan.audited:
            self._cache.keep_note_sent(boundary.direction, slot, note)
            self._recorder.sent(SignalId(Kind.NOTE, boundary, self._lane(running), slot), note.whole)
        message_id = MessageId(running.plan.run, slot, NOTES[boundary.direction])
        self._transport.send_note(note.values, note.channels, self._peer(running, after.receiver), message_id)

    def _outgoing(self, direction: Direction, buffer_id: int) -> Tensor:
        if direction is Direction.ACTIVATION:
            output: Tensor = self._buffers["outputs"][buffer_id]
            return output.detach()
        return input_gradient(self._buffers["inputs"][buffer_id], self._local.stage)

    def _peer(self, running: RunningStep, stage: int) -> int:
        """The rank that serves ``stage`` in this worker's lane."""
        return self._local.mesh.rank(running.plan.wiring.worker(stage, self._lane(running)))

    def _lane(self, running: RunningStep) -> int:
        lane = running.plan.wiring.lane(self._local.worker)
        assert lane is not None, "a worker without a lane has no peers"
        return lane
