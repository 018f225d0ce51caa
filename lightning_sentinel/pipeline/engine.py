"""The process engine: DeepSpeed's ``PipelineEngine`` with one worker in this process.

Taken from DeepSpeed: the 1F1B schedule, the distribution of the model, the reduction of gradients, clipping, ZeRO and the optimizer
step. Ours: how a micro-batch is loaded and its loss computed (by the user's own step), what crosses a boundary and how, and the
instructions that tamper and verify.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule as ds_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch.optim import Optimizer

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.pipeline import schedule
from lightning_sentinel.pipeline.deepspeed_setup import check_engine
from lightning_sentinel.pipeline.exchange import Exchange, StepOutcome
from lightning_sentinel.pipeline.gradients import HeldGradients, scale_gradients
from lightning_sentinel.pipeline.guard import Guard, Ruling
from lightning_sentinel.pipeline.partition import StageModel
from lightning_sentinel.pipeline.predictions import share_predictions
from lightning_sentinel.pipeline.steps import MicroBatches, StepRunner, checked_signal, loss_of
from lightning_sentinel.pipeline.transport import Transport
from lightning_sentinel.verification import COLUMNS
from lightning_sentinel.verification.projection import Projection

__all__ = ["SentinelEngine"]


class SentinelEngine(PipelineEngine):  # type: ignore[misc]
    """Runs one worker's part of the pipeline; see :class:`lightning_sentinel.pipeline.face.Engine` for what each method does.

    Args:
        stage_model: this process's stage.
        optimizer: the user's optimizer over this stage's parameters; ``None`` for evaluation.
        steps: runs the user's step functions.
        transport: sends and receives signals.
        guard: verifies what is received; ``None`` for a plain pipeline.
        clip_norm: clip the norm of all stages' gradients to this; 0 does not clip.
        forward_context: entered around every forward pass, for mixed precision.
    """

    def __init__(
        self,
        stage_model: StageModel,
        optimizer: Optimizer | None,
        steps: StepRunner,
        transport: Transport,
        guard: Guard | None,
        clip_norm: float = 0.0,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        pipeline = stage_model.pipeline
        config = {
            # Batches are dealt by us, so that gradients are scaled in one place; DeepSpeed sees one micro-batch a step.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm,
            "steps_per_print": None,
        }
        groups = list(optimizer.param_groups) if optimizer is not None else []
        super().__init__(
            args=None,
            model=pipeline,
            optimizer=optimizer,
            mpu=pipeline.mpu(),
            config=config,
            config_class=DeepSpeedConfig(config, pipeline.mpu()),
        )
        check_engine(self)
        if optimizer is not None:
            # DeepSpeed drops parameter groups that are empty on this stage, and a learning-rate scheduler would then pair its rates
            # with the wrong groups.
            optimizer.param_groups[:] = groups
        mesh = stage_model.mesh
        self.worker: Worker = mesh.worker(self.global_rank)
        self.adversary: Adversary | None = None
        self.guard = guard
        self._mesh = mesh
        self._step = 0
        self._steps = steps
        self._transport = transport
        self._forward_context = forward_context
        self._exchange = Exchange(mesh, self.device)
        self._last_layer = stage_model.stage_layers(self.worker.stage)[-1]
        self._untainted = torch.tensor(False, device=self.device)
        self.pipe_buffers["taints"] = []
        self._held = HeldGradients(list(self.module.parameters()))
        self._altered: Tensor | None = None
        self._received_gradient: Tensor | None = None

    # ---------------------------------------------------------------------------------------------------------- whole steps

    def train(self, arguments: tuple[Any, ...], step: int, micro_batches: int, scale: float) -> StepOutcome:
        self._begin("training_step", arguments, micro_batches)
        self._step, self._scale = step, scale
        self._exec_schedule(schedule.TrainSchedule(micro_batches, self.num_stages, self.stage_id))
        self._transport.finish_notes()
        return self._exchange.run("training_step", self._rows(), self._weights(), self._loss, self._steps.recorder)

    def evaluate(self, step: str, arguments: tuple[Any, ...], micro_batches: int) -> StepOutcome:
        self._forward_only(step, arguments, micro_batches)
        kind = "/".join((step, *map(str, arguments[2:])))
        nothing = torch.empty(0, device=self.device)
        return self._exchange.run(kind, nothing, self._weights(), self._loss, self._steps.recorder)

    def predict(self, arguments: tuple[Any, ...], micro_batches: int) -> Any:
        self._forward_only("predict_step", arguments, micro_batches)
        return share_predictions(self._results, self._mesh, self.worker, self.grid.get_pipe_parallel_group())

    def _forward_only(self, step: str, arguments: tuple[Any, ...], micro_batches: int) -> None:
        self._begin(step, arguments, micro_batches)
        with torch.no_grad():
            self._exec_schedule(schedule.InferenceSchedule(micro_batches, self.num_stages, self.stage_id))

    def settle(self, outcome: StepOutcome, step: int) -> Ruling | None:
        if self.guard is None or outcome.table is None:
            return None
        return self.guard.settle(outcome.table, step, self._sum_over_replicas)

    def _begin(self, step: str, arguments: tuple[Any, ...], micro_batches: int) -> None:
        self._step_name, self._arguments = step, arguments
        self._batches = MicroBatches(arguments[0], micro_batches)
        self._steps.new_records()
        self._results: list[Any] = []
        self._loss = torch.zeros(2, device=self.device)

    def _weights(self) -> Tensor:
        return torch.tensor(self._batches.weights, device=self.device)

    def _rows(self) -> Tensor:
        """``(2, micro_batches, columns)``: what this worker received, activations first; nothing if it is not verified."""
        if self.guard is None:
            return torch.empty(0, device=self.device)
        count = len(self._batches)
        nothing = torch.zeros(count, len(COLUMNS), device=self.device)
        incoming = {boundary.direction: boundary for boundary in self.guard.verifiers}
        return torch.stack(
            [self.guard.take_rows(incoming[direction])[0] if direction in incoming else nothing for direction in Direction]
        )

    def _sum_over_replicas(self, vector: Tensor) -> Tensor:
        dist.all_reduce(vector, group=self.grid.get_data_parallel_group())
        return vector

    # ------------------------------------------------------------------------------------------------- gradients and weights

    def hold_gradients(self) -> None:
        self._held.hold()

    def release_gradients(self) -> None:
        self._held.release()

    def reduce_gradients(self, shares: list[float]) -> None:
        scale_gradients(list(self.module.parameters()), 1.0 / shares[self.worker.stage])
        self._exec_reduce_tied_grads()
        self._exec_reduce_grads()

    def apply_gradients(self) -> None:
        self._exec_optimizer_step()

    def discard_gradients(self) -> None:
        self.zero_grad()

    # -------------------------------------------------------------------------------------------------------- instructions

    def _exec_load_micro_batch(self, buffer_id: int, micro_batch: int) -> None:
        if self.is_first_stage():
            with self._forward_context():
                self.pipe_buffers["inputs"][buffer_id] = self._steps.input_of(self._step_name, self._part(micro_batch))
            self.pipe_buffers["taints"][buffer_id] = self._initial_taint()

    def _exec_forward_pass(self, buffer_id: int, micro_batch: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        if isinstance(inputs, Tensor) and inputs.requires_grad:
            # A layer may work in place, which autograd does not allow on the leaf that the gradient is read from.
            inputs = inputs.clone()
        with self._forward_context():
            outputs = DeepSpeedEngine.forward(self, inputs)
        if not self.is_last_stage():
            self.pipe_buffers["outputs"][buffer_id] = checked_signal(outputs, self._last_layer, self.stage_id)
            return
        counts = ~self.pipe_buffers["taints"][buffer_id] if self._excludes else ~self._untainted
        with self._forward_context():
            result = self._steps.finish(self._step_name, self._part(micro_batch), outputs, self._batches.sizes[micro_batch], counts)
        if self._step_name != "training_step":
            self._results.append(result)
            return
        loss = loss_of(result, self._step_name)
        weight = self._batches.weights[micro_batch]
        self._loss += torch.stack((torch.where(counts, loss.detach().float() * weight, 0.0), counts * weight))
        self.pipe_buffers["outputs"][buffer_id] = torch.where(counts, loss * (weight * self._scale), 0.0)

    def _exec_backward_pass(self, buffer_id: int, micro_batch: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self.is_last_stage():
            DeepSpeedEngine.backward(self, outputs, scale_wrt_gas=False)
        else:
            self._received_gradient = self.pipe_buffers["output_tensors"][buffer_id]
            # DeepSpeed's hooks refuse a backward pass of which the engine does not know.
            self._running_engine_backward = True
            try:
                outputs.backward(gradient=self._received_gradient)
            finally:
                self._running_engine_backward = False
        self.pipe_buffers["outputs"][buffer_id] = self.pipe_buffers["output_tensors"][buffer_id] = None

    def _exec_send_activation(self, buffer_id: int, micro_batch: int) -> None:
        self._send(Direction.ACTIVATION, buffer_id, header=True)

    def _exec_send_gradient(self, buffer_id: int, micro_batch: int) -> None:
        self._send(Direction.GRADIENT, buffer_id, header=False)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_activation(self, buffer_id: int, micro_batch: int) -> None:
        signal, tainted = self._transport.receive(self.grid.stage_to_global(self.stage_id - 1))
        self.pipe_buffers["inputs"][buffer_id] = signal.requires_grad_()
        self.pipe_buffers["taints"][buffer_id] = tainted

    def _exec_recv_gradient(self, buffer_id: int, micro_batch: int) -> None:
        like = self.pipe_buffers["outputs"][buffer_id]
        signal, tainted = self._transport.receive(self.grid.stage_to_global(self.stage_id + 1), like=like)
        self.pipe_buffers["output_tensors"][buffer_id] = signal
        self.pipe_buffers["taints"][buffer_id] = tainted

    def _exec_verify_activation(self, buffer_id: int, micro_batch: int) -> None:
        signal = self._verified(Direction.ACTIVATION, self.pipe_buffers["inputs"][buffer_id].detach(), buffer_id)
        self.pipe_buffers["inputs"][buffer_id] = signal.requires_grad_()

    def _exec_verify_gradient(self, buffer_id: int, micro_batch: int) -> None:
        signal = self.pipe_buffers["output_tensors"][buffer_id]
        self.pipe_buffers["output_tensors"][buffer_id] = self._verified(Direction.GRADIENT, signal, buffer_id)

    def _exec_tamper_activation(self, buffer_id: int, micro_batch: int) -> None:
        self._tamper(Direction.ACTIVATION, self.pipe_buffers["inputs"][buffer_id], buffer_id, micro_batch)

    def _exec_tamper_gradient(self, buffer_id: int, micro_batch: int) -> None:
        self._tamper(Direction.GRADIENT, self._received_gradient, buffer_id, micro_batch)

    # ------------------------------------------------------------------------------------------- what the instructions share

    @property
    def _excludes(self) -> bool:
        return self.guard is not None and self.guard.excludes

    def _part(self, micro_batch: int) -> tuple[Any, ...]:
        return (self._batches[micro_batch], *self._arguments[1:])

    def _initial_taint(self) -> Tensor:
        return self._untainted if self.guard is None else self.guard.initial_taint(self._step)[0]

    def _verified(self, direction: Direction, signal: Tensor, buffer_id: int) -> Tensor:
        if self.guard is None:
            return signal
        boundary = Boundary(self.stage_id - (direction is Direction.ACTIVATION), direction)
        tainted, before = self.pipe_buffers["taints"][buffer_id], self._mesh.before(boundary)
        received = None
        if before is not None and self.guard.compares_inputs:
            received = Projection(*self._transport.receive_note(self.grid.stage_to_global(before.sender)))
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
        gradient = self.pipe_buffers["inputs"][buffer_id].grad
        if gradient is None:
            raise PipelineModelError(
                f"The input of stage {self.stage_id} received no gradient: its layers do not use it. Every layer must depend on the"
                " output of the one before."
            )
        return gradient

    def _send(self, direction: Direction, buffer_id: int, *, header: bool) -> None:
        # An altered copy: the tensor itself is what the backward pass of this stage starts from.
        signal, self._altered = (self._outgoing(buffer_id, direction) if self._altered is None else self._altered), None
        boundary = Boundary(self.stage_id - (direction is Direction.GRADIENT), direction)
        receiver = self.grid.stage_to_global(boundary.receiver)
        self._transport.send(signal, self.pipe_buffers["taints"][buffer_id], receiver, header=header)
        after = self._mesh.after(boundary)
        if self.guard is not None and after is not None and self._step_name == "training_step":
            note = self.guard.project(after, signal)
            if note is not None:
                self._transport.send_note(note.values, note.channels, self.grid.stage_to_global(after.receiver))

    _INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | {
        ds_schedule.LoadMicroBatch: _exec_load_micro_batch,
        ds_schedule.ForwardPass: _exec_forward_pass,
        ds_schedule.BackwardPass: _exec_backward_pass,
        ds_schedule.SendActivation: _exec_send_activation,
        ds_schedule.RecvActivation: _exec_recv_activation,
        ds_schedule.SendGrad: _exec_send_gradient,
        ds_schedule.RecvGrad: _exec_recv_gradient,
        schedule.TamperActivation: _exec_tamper_activation,
        schedule.TamperGradient: _exec_tamper_gradient,
        schedule.VerifyActivation: _exec_verify_activation,
        schedule.VerifyGradient: _exec_verify_gradient,
    }
