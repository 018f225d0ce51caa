"""What crosses the boundaries of the process engine's stage: the instructions that send, receive, tamper and verify."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as ds_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline import schedule
from lightning_sentinel.pipeline.data.sample_exchange import AssignedMicroBatch
from lightning_sentinel.pipeline.messages.headers import NOTES, NOTHING, SIGNALS, Kind, MessageId
from lightning_sentinel.pipeline.messages.inbox import Inbox
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.pipeline.recovery.auditing import SignalCache
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.steps import input_gradient
from lightning_sentinel.wiring import Wiring

__all__ = ["StageBoundaries"]


class StageBoundaries(PipelineEngine):  # type: ignore[misc]
    """The part of the process engine that works on signals; what the layers do with them is the other."""

    worker: Worker
    adversary: Adversary | None
    guard: Guard | None
    _mesh: Mesh
    _wiring: Wiring
    _transport: Transport
    _inbox: Inbox
    _signal_cache: SignalCache
    _work: list[AssignedMicroBatch]
    _step_name: str
    _step: int
    _runs: int
    _altered: Tensor | None
    """What the simulated attacker made of the signal that is sent next."""
    _received_gradient: Tensor | None
    pipe_buffers: dict[str, list[Any]]

    def _exec_send_activation(self, buffer_id: int, micro_batch: int) -> None:
        self._send(Direction.ACTIVATION, buffer_id, micro_batch)

    def _exec_send_gradient(self, buffer_id: int, micro_batch: int) -> None:
        self._send(Direction.GRADIENT, buffer_id, micro_batch)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_activation(self, buffer_id: int, micro_batch: int) -> None:
        sender, message_id = self._peer(self.stage_id - 1), self._message_id(Kind.ACTIVATION, micro_batch)
        signal, tainted = self._inbox.activation(sender, message_id, self._work[micro_batch].samples)
        if signal is not None:
            self._signal_cache.keep(self._signal_cache.received, Direction.ACTIVATION, micro_batch, signal)
            signal.requires_grad_()
        self.pipe_buffers["inputs"][buffer_id] = signal
        self.pipe_buffers["taints"][buffer_id] = tainted

    def _exec_recv_gradient(self, buffer_id: int, micro_batch: int) -> None:
        output, message_id = self.pipe_buffers["outputs"][buffer_id], self._message_id(Kind.GRADIENT, micro_batch)
        signal, tainted = self._inbox.gradient(self._peer(self.stage_id + 1), message_id, output)
        self._signal_cache.keep(self._signal_cache.received, Direction.GRADIENT, micro_batch, signal)
        self.pipe_buffers["output_tensors"][buffer_id] = signal
        # What was left out on its way forward stays left out, whatever comes back says.
        self.pipe_buffers["taints"][buffer_id] = tainted | self.pipe_buffers["taints"][buffer_id]

    def _exec_verify_activation(self, buffer_id: int, micro_batch: int) -> None:
        signal = self._verified(Direction.ACTIVATION, self.pipe_buffers["inputs"][buffer_id].detach(), buffer_id, micro_batch)
        self.pipe_buffers["inputs"][buffer_id] = signal.requires_grad_()

    def _exec_verify_gradient(self, buffer_id: int, micro_batch: int) -> None:
        signal = self.pipe_buffers["output_tensors"][buffer_id]
        self.pipe_buffers["output_tensors"][buffer_id] = self._verified(Direction.GRADIENT, signal, buffer_id, micro_batch)

    def _exec_tamper_activation(self, buffer_id: int, micro_batch: int) -> None:
        self._tamper(Direction.ACTIVATION, self.pipe_buffers["inputs"][buffer_id], buffer_id, micro_batch)

    def _exec_tamper_gradient(self, buffer_id: int, micro_batch: int) -> None:
        self._tamper(Direction.GRADIENT, self._received_gradient, buffer_id, micro_batch)

    def _peer(self, stage: int) -> int:
        """The rank that serves another stage of this lane."""
        lane = self._wiring.lane(self.worker)
        assert lane is not None, "a worker without a lane has no peers"
        return self._mesh.rank(self._wiring.worker(stage, lane))

    def _message_id(self, kind: Kind, micro_batch: int) -> MessageId:
        return MessageId(self._runs, micro_batch, kind)

    def _verified(self, direction: Direction, signal: Tensor, buffer_id: int, micro_batch: int) -> Tensor:
        if self.guard is None:
            return signal
        boundary = Boundary(self.stage_id - (direction is Direction.ACTIVATION), direction)
        tainted, before = self.pipe_buffers["taints"][buffer_id], self._mesh.before(boundary)
        received = None
        if before is not None and self.guard.compares_inputs:
            received = self._inbox.note(self._peer(before.sender), self._message_id(NOTES[direction], micro_batch))
        signal, tainted = self.guard.receive(boundary, signal, tainted.view(1), received)
        self.pipe_buffers["taints"][buffer_id] = tainted[0]
        return signal

    def _tamper(self, direction: Direction, received: Tensor | None, buffer_id: int, micro_batch: int) -> None:
        if self.adversary is not None and self.worker in self.adversary.workers:
            signal = self._outgoing(buffer_id, direction)
            self._altered = self.adversary.tamper(signal, self.worker, direction, self._step, micro_batch, received)

    def _outgoing(self, buffer_id: int, direction: Direction) -> Tensor:
        if direction is Direction.ACTIVATION:
            return self.pipe_buffers["outputs"][buffer_id].detach()
        return input_gradient(self.pipe_buffers["inputs"][buffer_id], self.stage_id)

    def _send(self, direction: Direction, buffer_id: int, micro_batch: int) -> None:
        if direction is Direction.ACTIVATION and self.pipe_buffers["outputs"][buffer_id] is None:
            taint, message_id = self.pipe_buffers["taints"][buffer_id], self._message_id(Kind.ACTIVATION, micro_batch)
            self._transport.send(torch.empty(0), taint, self._peer(self.stage_id + 1), message_id, NOTHING)
            return
        # An altered copy: the tensor itself is what the backward pass of this stage starts from.
        signal, self._altered = (self._outgoing(buffer_id, direction) if self._altered is None else self._altered), None
        self._signal_cache.keep(self._signal_cache.sent, direction, micro_batch, signal)
        boundary = Boundary(self.stage_id - (direction is Direction.GRADIENT), direction)
        taint, message_id = self.pipe_buffers["taints"][buffer_id], self._message_id(SIGNALS[direction], micro_batch)
        is_new_shape = direction is Direction.ACTIVATION and self._inbox.is_new_shape(micro_batch)
        self._transport.send(signal, taint, self._peer(boundary.receiver), message_id, is_new_shape)
        after = self._mesh.after(boundary)
        if self.guard is not None and after is not None and self._step_name == "training_step":
            note = self.guard.project(after, signal)
            if note is not None:
                message_id = self._message_id(NOTES[direction], micro_batch)
                values = note.values
                if self.adversary is not None:
                    values = self.adversary.note(self.worker, values, self._step)
                self._transport.send_note(values, note.channels, self._peer(after.receiver), message_id)

    _INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | {
        ds_schedule.SendActivation: _exec_send_activation,
        ds_schedule.RecvActivation: _exec_recv_activation,
        ds_schedule.SendGrad: _exec_send_gradient,
        ds_schedule.RecvGrad: _exec_recv_gradient,
        schedule.TamperActivation: _exec_tamper_activation,
        schedule.TamperGradient: _exec_tamper_gradient,
        schedule.VerifyActivation: _exec_verify_activation,
        schedule.VerifyGradient: _exec_verify_gradient,
    }
