"""The virtual engine: a whole mesh in this process.

All replicas of a stage hold the same weights, so one copy of the module serves any number of them: the micro-batches of all
replicas go through a stage side by side along the batch axis, and at each boundary every worker's signal is tampered with and
verified on its own. Verifiers, ledger, attacks and verdicts are those of the process engine.

A layer that mixes samples of a batch (BatchNorm in training mode) sees those of all replicas, as it would under ``SyncBatchNorm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.pipeline.data.dealing import Deal
from lightning_sentinel.pipeline.data.micro_batches import MicroBatches
from lightning_sentinel.pipeline.exchange import StepOutcome
from lightning_sentinel.pipeline.gradients.clipping import Clipping
from lightning_sentinel.pipeline.gradients.held import HeldGradients, scale_gradients
from lightning_sentinel.pipeline.gradients.shares import Shares
from lightning_sentinel.pipeline.gradients.ties import Untied
from lightning_sentinel.pipeline.randomness import Draws
from lightning_sentinel.pipeline.recovery.guard import Guard, Ruling
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.results.joining import join, plain, reorder
from lightning_sentinel.pipeline.results.losses import refuse_sum
from lightning_sentinel.pipeline.stages.lanes import SideBySide
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.pipeline.steps import StepRunner, checked_signal, loss_of
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.audit import Outcome, arithmetic, relative_error, tolerance
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.projection import Projection
from lightning_sentinel.wiring import Part, Wiring

__all__ = ["VirtualEngine"]


class VirtualEngine:
    """Runs all workers of a mesh; see :class:`lightning_sentinel.pipeline.face.Engine` for what each method does.

    Args:
        stage_model: the module with all of its stages.
        optimizer: the user's; ``None`` for evaluation.
        steps: runs the user's step functions.
        guard: of all boundaries and replicas; ``None`` for a plain pipeline.
        device: where the module is.
        seed: of the random numbers in forward passes.
        clipping: of gradients.
        activation_checkpointing: recompute the activations of a layer in its backward pass instead of keeping them.
        forward_context: entered around every forward pass.
    """

    def __init__(
        self,
        stage_model: StageModel,
        optimizer: Optimizer | None,
        steps: StepRunner,
        guard: Guard | None,
        device: torch.device,
        seed: int,
        clipping: Clipping = Clipping(),  # noqa: B008 - immutable
        activation_checkpointing: bool = False,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.guard = guard
        self.adversary: Adversary | None = None
        self.keeps_results = False
        self._model = stage_model
        self._mesh = stage_model.mesh
        self._optimizer = optimizer
        self._steps = steps
        self._device = device
        self._clipping = clipping
        self._seed = seed
        self._side_by_side = SideBySide(device, activation_checkpointing)
        self._forward_context = forward_context
        layers, parts = stage_model.layers.layers, stage_model.parts
        self._stages = [layers[parts[stage] : parts[stage + 1]] for stage in range(self._mesh.stages)]
        self._untied = Untied(self._stages)
        self._parameters = [parameter for stage in self._untied.parameters for parameter in stage]
        self._buffers = [buffer for stage in self._stages for layer in stage for buffer in layer.buffers()]
        self._held = HeldGradients(self._parameters)
        self._wiring = Wiring.of(self._mesh)
        self._evaluations = 0
        self._lies: dict[int, dict[tuple[int, int], Tensor]] = {}
        self._told: dict[int, dict[tuple[int, int], bool]] | None = None
        self._rewind: Rewind | None = None
        self.left_out: frozenset[Worker] = frozenset()

    def reseed(self, seed: int) -> None:
        self._seed = seed

    # ---------------------------------------------------------------------------------------------------------- whole steps

    def train(self, arguments: tuple[Any, ...], step: int, deal: Deal, scale: float) -> StepOutcome:
        micro_batches, replicas = deal.sizes.micro_batches, deal.replicas
        self._steps.new_records()
        self._lies.clear()
        self._told = None
        self._wiring = Wiring.of(self._mesh, micro_batches=micro_batches)
        if self.guard is not None:
            self._wiring = self.guard.begin(step, micro_batches)
            if self.guard.audits:
                self._rewind = Rewind(self._parameters, self._buffers, self._device)
                self._restore_metrics = self._steps.remember_metrics()
        self._results: list[tuple[Sequence[int], Any]] = []
        self._rows, self._side_by_side.apart = deal.rows, deal.by_module
        losses = torch.zeros(2, device=self._device)
        for index in range(micro_batches):
            parts = [(replica[index], *arguments[1:]) for replica in replicas]
            losses += self._train_micro_batch(parts, replicas, index, step, scale)
        if self._results:
            rows, results = zip(*self._results)
            order = torch.tensor([row for one in rows for row in one])
            self._returned = reorder(join(results, [len(one) for one in rows], average=True), order)
        weights = self._wiring.arrange(torch.tensor([replica.weights for replica in replicas]))
        received = [] if self.guard is None else [self.guard.take_rows(boundary) for boundary in self._mesh.boundaries]
        return self._outcome(losses, torch.stack(received) if received else None, weights)

    def rewind(self) -> None:
        assert self._rewind is not None, "only what is audited is done again"
        self._rewind()
        self._restore_metrics()

    def _ask(self, boundary: Boundary, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        """What workers say of the last batch's signals.

        Recomputation by a peer is simulated, too: this engine has computed every worker's honest signal before an adversary
        replaced it, so what differs is known, and an audit is a look at it; unless the adversary speaks for the auditor.
        """
        lies, said = self._known_lies().get(self._mesh.boundaries.index(boundary), {}), []
        for case, juror in asked:
            lied = lies.get((case.lane, case.slot), False)
            word = Outcome.LIED if lied else Outcome.MATCHES
            said.append(word if self.adversary is None else Outcome(self.adversary.vote(juror, case.audited, word)))
        return said

    def _known_lies(self) -> dict[int, dict[tuple[int, int], bool]]:
        """By boundary and place; a device is waited for at the first audit of a step, and then no more."""
        if self._told is None:
            lied = [lie for lies in self._lies.values() for lie in lies.values()]
            answers = iter(torch.stack(lied).tolist() if lied else ())
            self._told = {boundary: {place: next(answers) for place in lies} for boundary, lies in self._lies.items()}
        return self._told

    def _train_micro_batch(
        self, parts: list[tuple[Any, ...]], replicas: Sequence[MicroBatches], index: int, step: int, scale: float
    ) -> Tensor:
        """Forward and backward of one micro-batch of all replicas.

        Returns:
            ``(2,)``, sum of the weighted losses that count, and of their weights.
        """
        last = self._mesh.stages - 1
        draws = [Draws.of(self._seed, step, Part(replica, index), len(parts)) for replica in range(len(parts))]
        signals = self._input_of("training_step", parts, draws)
        tainted = torch.zeros(len(parts), dtype=torch.bool, device=self._device)
        if (lanes := self._lanes(index)) is not None:
            tainted = ~torch.tensor(self._wiring.live, device=self._device)[lanes]
        leaves: list[Any] = []
        outputs: list[Tensor] = []
        for stage in range(self._mesh.stages):
            leaf = signals.detach().requires_grad_() if stage else signals
            output = self._forward(stage, leaf, draws)
            leaves.append(leaf)
            outputs.append(output)
            if stage < last:
                layer = self._model.stage_layers(stage)[-1]
                sent = checked_signal(output, layer, stage).detach()
                boundary = Boundary(stage, Direction.ACTIVATION)
                signals, tainted = self._cross(boundary, sent, leaf, tainted, index, step)

        counts = ~tainted if self.guard is not None and self.guard.excludes else torch.ones_like(tainted)
        sums, total = torch.zeros(2, device=self._device), torch.zeros((), device=self._device)
        for replica, (part, output) in enumerate(zip(parts, outputs[last].chunk(len(parts)))):
            draws[replica].seed_step(self._device)
            with self._forward_context():
                result = self._steps.finish("training_step", part, output, replicas[replica].sizes[index], counts[replica])
            if self.keeps_results:
                self._results.append((self._rows[replica][index], plain(result)))
            loss, weight = loss_of(result, "training_step"), replicas[replica].weights[index]
            if len(replicas[replica]) > 1:
                refuse_sum(loss, replicas[replica].sizes[index], "training_step")
            total = total + torch.where(counts[replica], loss * (weight * scale), 0.0)
            sums += torch.stack((torch.where(counts[replica], loss.detach().float() * weight, 0.0), counts[replica] * weight))
        total.backward()

        received: Tensor | None = None
        for stage in range(last, 0, -1):
            sent, boundary = leaves[stage].grad, Boundary(stage - 1, Direction.GRADIENT)
            received, tainted = self._cross(boundary, sent, received, tainted, index, step)
            if outputs[stage - 1].requires_grad:  # not if all up to here is frozen
                outputs[stage - 1].backward(received)
        return sums

    def _cross(
        self, boundary: Boundary, sent: Tensor, received: Any, tainted: Tensor, micro_batch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """What the receivers of a boundary go on with: the signals of all senders, tampered with and verified."""
        if self.adversary is not None:
            sent = self._tampered(self.adversary, boundary, sent, received, micro_batch, step)
        if self.guard is None:
            return sent, tainted
        first = self._mesh.before(boundary) is None
        projected = None if first else self._noted(boundary, self.guard.project(boundary, received.detach()), micro_batch, step)
        return self.guard.receive(boundary, sent, tainted, projected, self._lanes(micro_batch))

    def _noted(self, boundary: Boundary, note: Projection | None, micro_batch: int, step: int) -> Projection | None:
        """What those before the senders of a boundary say that they had sent them."""
        before = self._mesh.before(boundary)
        if self.adversary is None or self.adversary.notes is None or note is None or before is None:
            return note
        pieces = list(note.values.chunk(self._mesh.replicas))
        for replica, piece in enumerate(pieces):
            lane, _ = self._wiring.places[Part(replica, micro_batch)]
            pieces[replica] = self.adversary.note(self._wiring.worker(before.sender, lane), piece, step)
        return note._replace(values=torch.cat(pieces))

    def _tampered(
        self, adversary: Adversary, boundary: Boundary, sent: Tensor, received: Any, micro_batch: int, step: int
    ) -> Tensor:
        places = [self._wiring.places[Part(replica, micro_batch)] for replica in range(self._mesh.replicas)]
        serving = [self._wiring.worker(boundary.sender, lane) for lane, _ in places]
        if not adversary.workers.intersection(serving):
            return sent
        pieces = list(sent.chunk(self._mesh.replicas))
        got = received.chunk(self._mesh.replicas) if isinstance(received, Tensor) else [None] * self._mesh.replicas
        lies = self._lies.setdefault(self._mesh.boundaries.index(boundary), {})
        for index, ((lane, slot), worker) in enumerate(zip(places, serving)):
            honest = pieces[index]
            pieces[index] = adversary.tamper(honest, worker, boundary.direction, step, slot, got[index])
            if pieces[index] is not honest:
                lies[lane, slot] = relative_error(pieces[index], honest) > self._tolerance(honest.dtype)
        return torch.cat(pieces)

    def _tolerance(self, dtype: torch.dtype) -> float:
        with self._forward_context():
            return tolerance(dtype, arithmetic(self._device))

    def _lanes(self, micro_batch: int) -> Tensor | None:
        """Which lane works on a micro-batch of each replica; ``None`` while each works on its own."""
        if all(self._wiring.live):
            return None
        lanes = [self._wiring.places[Part(replica, micro_batch)][0] for replica in range(self._mesh.replicas)]
        return torch.tensor(lanes, device=self._device)

    def evaluate(self, step: str, arguments: tuple[Any, ...], deal: Deal) -> StepOutcome:
        self._steps.new_records()
        self._returned = plain(self._run_whole(step, arguments, deal.samples))
        return self._outcome(torch.zeros(2, device=self._device), None, torch.ones(1, 1))

    def predict(self, arguments: tuple[Any, ...], deal: Deal) -> Any:
        return self._run_whole("predict_step", arguments, deal.samples)

    def returned(self) -> Any:
        return self._returned

    def _run_whole(self, step: str, arguments: tuple[Any, ...], samples: int) -> Any:
        """A step without boundaries: the weights are those of all replicas, and nobody else's word is needed."""
        self._evaluations += 1
        draws = Draws(self._seed, -self._evaluations, 0)
        draws.seed_step(self._device)
        signals = self._input_of(step, [arguments])
        for stage in range(self._mesh.stages):
            signals = self._forward(stage, signals)
        draws.seed_step(self._device)
        with self._forward_context():
            return self._steps.finish(step, arguments, signals, samples, torch.tensor(True, device=self._device))

    def settle(self, outcome: StepOutcome, step: int) -> Ruling | None:
        if self.guard is None or outcome.table is None:
            return None
        return self.guard.settle(outcome.table, step, lambda vector: vector, self._ask if self.guard.audits else None)

    def _outcome(self, losses: Tensor, rows: Tensor | None, weights: Tensor) -> StepOutcome:
        recorder = self._steps.recorder
        (total, weight), logged, *read = _on_host(losses, recorder.vector(), *([] if rows is None else [rows]))
        return StepOutcome(
            loss=float(total / weight) if weight > 0 else None,
            table=SignalTable.by_samples(read[0], self._wiring) if read else None,
            weights=weights,
            wiring=self._wiring,
            schema=recorder.schema,
            logged=recorder.schema.reduce(logged[None]),
        )

    def _input_of(self, step: str, parts: list[tuple[Any, ...]], draws: Sequence[Draws] | None = None) -> Any:
        inputs = []
        for replica, part in enumerate(parts):
            if draws is not None:
                draws[replica].seed_step(self._device)
            with self._forward_context():
                inputs.append(self._steps.input_of(step, part))
        if len(inputs) == 1:
            return inputs[0]
        shapes = [[tuple(one.shape) for one in (value if isinstance(value, tuple) else (value,))] for value in inputs]
        if any(shape != shapes[0] for shape in shapes):
            raise PipelineModelError(
                f"What the replicas of this virtual mesh put into their pipelines has shapes {', '.join(map(str, shapes))}, and it"
                " goes through the layers side by side. Pad all samples of a batch to one length before they are dealt, or use"
                " replicas=1 or engine='process', where every replica computes by itself."
            )
        return tuple(map(torch.cat, zip(*inputs))) if isinstance(inputs[0], tuple) else torch.cat(inputs)

    def _forward(self, stage: int, signals: Any, draws: Sequence[Draws] | None = None) -> Any:
        # A copy, because a layer may work in place, which autograd does not allow on the leaf that the gradient is read from.
        signals = signals.clone() if isinstance(signals, Tensor) and signals.requires_grad else signals
        if draws:
            draws[0].seed_stage(self._model.parts[stage])
        with self._forward_context():
            for number, layer in enumerate(self._stages[stage], self._model.parts[stage]):
                signals = self._side_by_side.run(number, layer, partial(self._untied.call, layer), signals, draws)
        return signals

    # ------------------------------------------------------------------------------------------------- gradients and weights

    stepped_by_others: frozenset[int] = frozenset()

    def hold_gradients(self) -> None:
        self._held.hold()

    def release_gradients(self) -> None:
        self._held.release()

    def reduce_gradients(self, shares: Shares) -> None:
        for parameters, share in zip(self._untied.parameters, shares.stages):
            scale_gradients(parameters, 1.0 / (self._mesh.replicas * share))
        self._untied.add_up()

    def apply_gradients(self) -> None:
        assert self._optimizer is not None
        limit, by = self._clipping
        if limit > 0:
            clip = nn.utils.clip_grad_value_ if by == "value" else nn.utils.clip_grad_norm_
            clip(self._untied.owners, limit)
        self._optimizer.step()
        self.discard_gradients()

    def discard_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _on_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors of the device on the host, all at once, so that the device is waited for once."""
    parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
