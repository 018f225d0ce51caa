"""The virtual engine: a whole mesh in this process.

All replicas of a stage hold the same weights, so one copy of the module serves any number of them: the micro-batches of all
replicas go through a stage side by side along the batch axis, in groups where their shapes differ, and at each boundary every
worker's signal is tampered with and verified on its own. Verifiers, ledger, attacks and verdicts are those of the process engine.

A layer that mixes samples of a batch (BatchNorm in training mode) sees those of all replicas of equal shape, as it would under
``SyncBatchNorm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.exchange import StepOutcome, is_skipped, mean_loss, part_weights
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractions
from lightning_sentinel.pipeline.gradients.contributions import broken
from lightning_sentinel.pipeline.gradients.stash import GradientStash, scale_gradients
from lightning_sentinel.pipeline.gradients.ties import Untied
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.pipeline.recovery.guard import Guard, Ruling
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.results.joining import join, plain, reorder
from lightning_sentinel.pipeline.running_statistics import RunningStatistics
from lightning_sentinel.pipeline.stages.batched_replicas import BatchedReplicas
from lightning_sentinel.pipeline.stages.partition import StageModel, refuse_frozen
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.pipeline.virtual_boundaries import MicroBatch
from lightning_sentinel.pipeline.virtual_passes import VirtualPasses
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.audit import Outcome, arithmetic
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.tolerance import MEASURED
from lightning_sentinel.wiring import Wiring

__all__ = ["VirtualEngine"]


class VirtualEngine(VirtualPasses):
    """Runs all workers of a mesh; see :class:`lightning_sentinel.pipeline.engine_protocol.Engine` for what each method does.

    Args:
        stage_model: the module with all of its stages.
        optimizer: the user's; ``None`` for evaluation.
        steps: runs the user's step functions.
        guard: of all boundaries and replicas; ``None`` for a plain pipeline.
        device: where the module is.
        seed: of the random numbers in forward passes.
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
        self._seed = seed
        self._batched = BatchedReplicas(device, activation_checkpointing, stage_model.places)
        self._forward_context = forward_context
        layers, parts = stage_model.layers.layers, stage_model.parts
        self._stages = [layers[parts[stage] : parts[stage + 1]] for stage in range(self._mesh.stages)]
        self._untied = Untied(self._stages)
        self._parameters = [parameter for stage in self._untied.parameters for parameter in stage]
        self._buffers = [buffer for stage in self._stages for layer in stage for buffer in layer.buffers()]
        self._stash = GradientStash(self._parameters)
        self._moving = [RunningStatistics(b for layer in stage for b in layer.buffers()) for stage in self._stages]
        steps.leaves_out = guard is not None and guard.excludes
        self._wiring = Wiring.of(self._mesh)
        self._evaluations = 0
        self._measured = {}
        self._told: dict[int, dict[tuple[int, int], list[float]]] | None = None
        self._rewind: Rewind | None = None
        self.left_out: frozenset[Worker] = frozenset()

    def reseed(self, seed: int) -> None:
        self._seed = seed

    # ---------------------------------------------------------------------------------------------------------- whole steps

    def train(self, arguments: tuple[Any, ...], step: int, deal: SplitBatch, scale: float) -> StepOutcome:
        if self._mesh.stages > 1 and not any(parameter.requires_grad for parameter in self._parameters):
            refuse_frozen(self._model.layers.module)
        self._wiring = Wiring.of(self._mesh, micro_batches=deal.sizes.micro_batches)
        if self.guard is not None:
            self._wiring = self.guard.begin(step, deal.sizes.micro_batches)
            if self.guard.replaces_malformed:
                self._rewind = Rewind(self._parameters, self._buffers, self._device)
                self._undo_steps = self._steps.remember()
        outcome, spoiled = self._attempt(arguments, step, deal, scale, apart=self._anybody_fails(step))
        if spoiled:
            assert self.guard is not None, "without one everything counts"
            # What one replica computed is in the sum of all.
            self.rewind()
            self.guard.forget_step()
            outcome, _ = self._attempt(arguments, step, deal, scale, apart=True)
        return outcome

    def _attempt(
        self, arguments: tuple[Any, ...], step: int, deal: SplitBatch, scale: float, apart: bool
    ) -> tuple[StepOutcome, bool]:
        """All micro-batches of a step; also whether gradients that were added up side by side are of no use."""
        replicas, sizes = deal.replicas, deal.sizes
        self._steps.new_records()
        self._measured.clear()
        self._told = None
        self._results = []
        self._rows, self._batched.apart = deal.rows, deal.by_module
        self._useless = torch.zeros(self._mesh.stages, self._mesh.replicas, sizes.micro_batches, dtype=torch.bool)
        self._called = 0
        said = torch.zeros(self._mesh.replicas, 3, device=self._device)
        # What a step does to its batch in place must not be seen where it is done again.
        again = self.guard is not None and (self.guard.audits or self.guard.replaces_malformed)
        for index in range(sizes.micro_batches):
            parts = [(copied(replica[index]) if again else replica[index], *arguments[1:]) for replica in replicas]
            said += self._pass(MicroBatch(parts, replicas, index, step, scale, apart))
        if len(self._results) == 1:
            ((_, self._returned),) = self._results
        elif self._results:
            rows, results = zip(*self._results)
            order = torch.tensor([row for one in rows for row in one])
            self._returned = reorder(join(results, [len(one) for one in rows], average=True), order)
        looks = self.guard is not None and self.guard.replaces_malformed
        useless = torch.zeros(1, device=self._device)
        if looks and not apart:
            useless = broken((parameter.grad for parameter in self._parameters), self._device).float().view(1)
        of_no_use = self._wiring.arrange(self._useless) if looks else None
        return self._outcome(said, self._received(sizes.micro_batches), sizes, of_no_use, useless)

    def _received(self, micro_batches: int) -> Tensor | None:
        if self.guard is None or not self._mesh.boundaries or not self._called:
            return None
        if self._called < micro_batches:
            raise PipelineModelError(
                f"training_step called the pipeline for {self._called} of {micro_batches} micro-batches only. Let it depend on"
                " batch_idx alone whether a batch is left out before the call; behind it training_step may return None."
            )
        return torch.stack([self.guard.take_rows(boundary) for boundary in self._mesh.boundaries])

    def rewind(self) -> None:
        assert self._rewind is not None, "nothing is done again unless somebody answers for it"
        self._rewind()
        self._undo_steps()

    def _ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        """What workers say of the last batch's signals.

        Recomputation by a peer is simulated, too: this engine has computed every worker's honest signal before an adversary
        replaced it, so what differs is known, and an audit is a look at it; unless the adversary speaks for the auditor.
        """
        assert self.guard is not None, "it is what asks"
        if not asked:
            return []
        tolerances, said, lies = self.guard.tolerances, [], self._known_lies()
        for case, juror in asked:
            index, place = self._mesh.boundaries.index(case.boundary), (case.lane, case.slot)
            dtypes = self._measured.get(index, {})
            measured = lies.get(index, {}).get(place, [0.0] * MEASURED)
            dtype = dtypes[place][0] if place in dtypes else torch.float32
            lied = measured[0] > tolerances.allowed(index, case.audited, dtype, self._computed_in())
            word = Outcome.LIED if lied else Outcome.MATCHES
            said.append(word if self.adversary is None else Outcome(self.adversary.vote(juror, case.audited, word)))
            if said[-1] == Outcome.MATCHES:
                tolerances.heard(index, case.audited, measured)
        return said

    def _known_lies(self) -> dict[int, dict[tuple[int, int], list[float]]]:
        """By boundary and place; a device is waited for at the first audit of a step, and then no more."""
        if self._told is None:
            measured = [found for places in self._measured.values() for _, found in places.values()]
            answers = iter(torch.stack(measured).tolist() if measured else ())
            self._told = {boundary: {place: next(answers) for place in places} for boundary, places in self._measured.items()}
        return self._told

    def _computed_in(self) -> torch.dtype:
        with self._forward_context():
            return arithmetic(self._device)

    def evaluate(self, step: str, arguments: tuple[Any, ...], deal: SplitBatch) -> StepOutcome:
        self._steps.new_records()
        self._wiring = Wiring.of(self._mesh, micro_batches=deal.sizes.micro_batches)
        self._returned = plain(self._run_whole(step, arguments, deal.samples))
        return self._outcome(torch.zeros(1, 3, device=self._device), None, deal.sizes, None)[0]

    def predict(self, arguments: tuple[Any, ...], deal: SplitBatch) -> Any:
        return self._run_whole("predict_step", arguments, deal.samples)

    def returned(self) -> Any:
        return self._returned

    def _run_whole(self, step: str, arguments: tuple[Any, ...], samples: int) -> Any:
        """A step without boundaries: the weights are those of all replicas, and nobody else's word is needed."""
        self._evaluations += 1
        seeds = MicroBatchSeeds(self._seed, -self._evaluations, 0)
        seeds.seed_step(self._device)
        with self._forward_context():
            run = self._steps.start(step, arguments, samples, self._device)
        output = None
        if run.waits:
            output = run.inputs
            for stage in range(self._mesh.stages):
                output = self._forward(stage, output)
        seeds.seed_answer()
        with self._forward_context():
            return run.finish(output, torch.tensor(True, device=self._device))

    def settle(self, outcome: StepOutcome, step: int) -> Ruling | None:
        if self.guard is None or outcome.table is None:
            return None
        self._steps.end_step()
        if outcome.skipped:
            self.guard.forget_step()
            return None
        ask = self._ask if self.guard.audits else None
        return self.guard.settle(outcome.table, step, lambda vector: vector, ask, broken=outcome.broken)

    def _outcome(
        self, losses: Tensor, rows: Tensor | None, sizes: BatchSizes, useless: Tensor | None, spoiled: Tensor | None = None
    ) -> tuple[StepOutcome, bool]:
        """What came of a step, and whether ``spoiled``: all is read in one go."""
        recorder = self._steps.recorder
        spoiled = torch.zeros(1, device=self._device) if spoiled is None else spoiled
        losses, spoiled, logged, *read = _on_host(losses, spoiled, recorder.vector(), *([] if rows is None else [rows]))
        outcome = StepOutcome(
            loss=mean_loss(losses, believed=useless is None),
            table=SignalTable.by_samples(read[0], self._wiring) if read else None,
            weights=part_weights(self._wiring, sizes),
            broken=useless,
            wiring=self._wiring,
            schema=recorder.schema,
            logged=recorder.schema.reduce(logged[None]),
            skipped=is_skipped(losses),
        )
        return outcome, bool(spoiled)

    # ------------------------------------------------------------------------------------------------- gradients and weights

    stepped_by_others: frozenset[int] = frozenset()

    def hold_gradients(self) -> None:
        self._stash.hold()

    def release_gradients(self) -> None:
        self._stash.release()

    def reduce_gradients(self, shares: CleanFractions) -> None:
        for parameters, share in zip(self._untied.parameters, shares.stages):
            scale_gradients(parameters, 1.0 / (self._mesh.replicas * share))
        self._untied.add_up()

    def clip_gradients(self, limit: float, by_value: bool) -> None:
        clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
        clip(self._untied.owners, limit)

    def apply_gradients(self, evaluate: Callable[[], Any] | None = None, **options: Any) -> Any:
        assert self._optimizer is not None
        result = self._optimizer.step(**options) if evaluate is None else self._optimizer.step(closure=evaluate, **options)
        self.discard_gradients()
        return result

    def discard_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _on_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors of the device on the host, all at once, so that the device is waited for once."""
    parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
