"""The Lightning strategy: data, steps and checkpoints of a verified pipeline.

A training step: Lightning's loop calls :meth:`SentinelStrategy.training_step`; the engine runs the schedule of all micro-batches,
and each signal is verified on receipt; one collective gives all ranks the scores, from which they derive the same verdicts; then
Lightning's hooks run in their usual order around the reduction of gradients, clipping and the optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed import Store
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.callbacks.monitor import SentinelMonitor
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.arithmetic import Arithmetic
from lightning_sentinel.pipeline.checkpoints.resumption import Unopened
from lightning_sentinel.pipeline.deepspeed_setup import prepare
from lightning_sentinel.pipeline.engine_protocol import Engine
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractionTally
from lightning_sentinel.pipeline.logs import LogReplay, silence_misleading_warnings
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.pipeline.planner import StepPlanner
from lightning_sentinel.pipeline.processes.hosts import host_name
from lightning_sentinel.pipeline.processes.liveness import Roster
from lightning_sentinel.pipeline.processes.renumbering import RenumberedEnvironment
from lightning_sentinel.pipeline.randomness import SeparateRandomness, seed_data, seed_of_state
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.recovery.ruling import Ruling
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.pipeline.step_results import StepOutcome
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.pipeline.virtual import VirtualEngine
from lightning_sentinel.seeds import secret_seed
from lightning_sentinel.strategy.announcements import Announcements, announce_detections, keep_latest, log_settings
from lightning_sentinel.strategy.protection import protection
from lightning_sentinel.strategy.refusals import (
    check_precision,
    check_replicas,
    refuse_exchanged_parameters,
    refuse_pruning,
    refuse_synchronised_layers,
    refuse_unsupported,
    require_optimizer,
    requiring_one_optimizer,
    warn_of_long_warmup,
    warn_of_short_warmup,
)
from lightning_sentinel.strategy.settings import StrategySettings
from lightning_sentinel.strategy.signals import DeferredSignals
from lightning_sentinel.strategy.stepping import OptimizerSteps
from lightning_sentinel.strategy.summary import print_mesh
from lightning_sentinel.strategy.throughput import count_pipelines
from lightning_sentinel.wiring import Wiring

__all__ = ["SentinelStrategy"]


class SentinelStrategy(OptimizerSteps):
    """Train a LightningModule as a DeepSpeed pipeline, and verify what crosses every stage boundary.

    It runs ``stages x replicas`` processes: each of ``replicas`` pipelines has ``stages`` stages. Rank zero serves the last stage,
    where the module's steps run whole; ``strategy.mesh.rank(worker)`` is the rank of a worker. The module is an ordinary one whose
    layers are an ``nn.Sequential``, or are returned by its ``configure_pipeline(self)``.

    Args:
        stages: number of pipeline stages. If left out, it follows from ``replicas`` and the number of processes.
        replicas: number of data-parallel pipelines. If left out, it follows from ``stages``; if both are left out, the mesh is as
            square as possible.
        micro_batches: how many micro-batches a replica's batch is dealt into. More of them keep the stages busier.
        verification: how signals are verified; ``None`` is plain pipeline parallelism.
        response: how the run responds to a flag.
        engine: ``"process"`` runs one worker per process; ``"virtual"`` runs a mesh of any size in this process. Then the loader's
            batch is that of the whole mesh, and is split over the replicas as a distributed sampler would split the samples.
        partition: how layers are assigned to stages: ``"parameters"``, ``"uniform"`` or ``"type:REGEX"``.
        sequential: name of the ``nn.Sequential`` to cut, if the module has several; with ``configure_pipeline``, name of the module
            whose call runs the pipeline, if it is not the smallest that has all layers (``""`` is the LightningModule).
        zero_stage: with 1 each worker of a stage keeps the optimizer state of some of the stage's parameters (ZeRO stage 1), a
            ``replicas``-th of its memory. Then no worker can be banned, because it would take with it state that only it has.
        activation_checkpointing: recompute activations in the backward pass instead of keeping them.
        transport: ``"device"`` sends tensors from their device, ``"host"`` through host memory, collectives included; ``"auto"``
            decides: where several ranks share a device it is the host.
        state_dict_type: ``"full"`` saves one ordinary file; with ``"sharded"`` a checkpoint is a directory to which each stage
            writes its own part, so that no process ever holds the whole model.
        timeout: how long any process waits for another before the run ends with an error that names the other.
        accelerator: this argument and the next four are those of every parallel strategy of Lightning; the Trainer sets them.
        parallel_devices: devices of this machine.
        cluster_environment: the environment that started the processes.
        checkpoint_io: reads and writes checkpoint files.
        precision_plugin: precision of the computation.

    Raises:
        ConfigurationError: if the settings cannot work.

    Example:
        >>> import lightning as L
        >>> import lightning_sentinel as ls
        >>> strategy = ls.SentinelStrategy(stages=2, replicas=2, verification=ls.Verification(warmup_steps=50))
        >>> trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=4, logger=False)
        >>> strategy.mesh
        Mesh(stages=2, replicas=2)
    """

    def __init__(
        self,
        stages: int | None = None,
        replicas: int | None = None,
        micro_batches: int = 4,
        verification: Verification | None = Verification(),  # noqa: B008 - frozen
        response: Response = Response(),  # noqa: B008 - frozen
        partition: str = "parameters",
        engine: Literal["process", "virtual"] = "process",
        sequential: str | None = None,
        zero_stage: int = 0,
        activation_checkpointing: bool = False,
        transport: Literal["auto", "device", "host"] = "auto",
        state_dict_type: Literal["full", "sharded"] = "full",
        timeout: timedelta = timedelta(minutes=5),
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self._settings = StrategySettings(
            stages=stages,
            replicas=replicas,
            micro_batches=micro_batches,
            verification=verification,
            response=response,
            partition=partition,
            engine=engine,
            sequential=sequential,
            zero_stage=zero_stage,
            activation_checkpointing=activation_checkpointing,
            transport=transport,
            state_dict_type=state_dict_type,
            timeout=timeout,
        )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        # Returned if no sample of the first batch counts. Not NaN, from which callbacks conclude that the training has diverged.
        self._last_loss = 0.0
        self._signals = DeferredSignals(self._watching)

    # ------------------------------------------------------------------------------------------------------------ the mesh

    @override
    def _admit(self, store: Store) -> tuple[int, ...]:
        return self._bans.admit(store, self.global_rank, self.world_size, self.stages, self.replicas)

    @override
    def _configure_launcher(self) -> None:
        # An impossible mesh is reported here, before any process is started.
        check_replicas(self.mesh, self.verification, self.response)
        if self._virtual and self.world_size > 1:
            raise ConfigurationError(
                f"A virtual mesh is in one process, but the Trainer has {self.world_size}. Use Trainer(devices=1), or"
                " engine='process'."
            )
        super()._configure_launcher()

    # --------------------------------------------------------------------------------------------------------------- set-up

    @override
    def setup_environment(self) -> None:
        """Lightning's hook before the user's ``setup`` hooks: refuse what cannot work, and connect the processes."""
        trainer = self._trainer
        assert self.lightning_module is not None
        refuse_unsupported(self.lightning_module, trainer, self._has_all)
        self._refuse_shards()
        refuse_pruning(trainer, self.mesh, self._virtual)
        refuse_synchronised_layers(self._layer_sync is not None, self._virtual)
        check_precision(self.precision_plugin, self.verification, self._virtual)
        self._stage_model = None
        super().setup_environment()
        if isinstance(self.cluster_environment, RenumberedEnvironment):
            check_replicas(self.mesh, self.verification, self.response)
        self._roster = Roster(self.mesh, self.global_rank, self._store, self.timeout)
        self._share_step_state()
        with self._watching():
            self._roster.meet()
            prepare(self.root_device, None if self._virtual else self.timeout, self.local_rank)
            hosts = (host_name(),) * self.mesh.size if self._virtual else self._roster.hosts
            self._bans.read(self.mesh, self.global_rank, hosts, self.broadcast)
        # Before data is prepared and split, so that all ranks split it alike.
        self._share_generators()
        self._seed = seed_of_state()
        if self._position not in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks += [self._position, self._signals]  # type: ignore[attr-defined]
        if self.verification is not None and not any(isinstance(c, SentinelMonitor) for c in trainer.callbacks):  # type: ignore[attr-defined]
            # Detections are logged by default, as Lightning shows a progress bar by default.
            trainer.callbacks.append(SentinelMonitor())  # type: ignore[attr-defined]

    @override
    def setup(self, trainer: L.Trainer) -> None:
        """Lightning's hook after ``configure_model``: cut the module, and make the optimizer and the engine."""
        module = self.lightning_module
        assert module is not None
        if not self._virtual:
            count_pipelines(trainer, self.mesh)
        with self._watching():
            model = self._take_stage()
            fitting = trainer.state.fn == TrainerFn.FITTING
            if fitting:
                with self._whole(), requiring_one_optimizer(module, self._has_all):
                    self.setup_optimizers(trainer)
                if not self._virtual:
                    require_optimizer(module, self.optimizers)
            self.setup_precision_plugin()
            self._engine = self._make_engine(model, self.optimizers[0] if fitting else None)
            self._engine.adversary = self.adversary
            self._planner = StepPlanner(self.mesh, self._engine.guard, self._seed)
            self._randomness = SeparateRandomness(self._seed, self.global_rank, self.root_device)
            self._agree_on_listeners()
        self._learn_how_to_deal()
        self._replay = LogReplay(module, self._value_of)
        # Stages may have drawn the initial values of their own layers.
        self._share_generators()
        seed_data(self._seed, self.worker.replica)
        self._clean_fractions = CleanFractionTally(self.mesh)
        silence_misleading_warnings()
        if fitting:
            log_settings(trainer, self._settings.plain)
        if fitting and self.is_global_zero:
            print_mesh(model, protection(self.mesh, self.verification, self.response))

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Lightning's hook when a run fails: report the failure to other ranks, and ban the sender of a malformed message."""
        if self._roster is None:
            return
        self._roster.report_failure(exception)
        if isinstance(exception, MalformedMessageError) and exception.rank is not None:
            self._bans.keep_malformed(self.mesh.worker(exception.rank), self.step)

    @override
    def teardown(self) -> None:
        self._engine = self._planner = self._steps = None  # the module may outlive the run, and keeps its last Trainer
        super().teardown()

    def _make_engine(self, model: StageModel, optimizer: Optimizer | None) -> Engine:
        # Imported here, because DeepSpeed must not be imported before its accelerator is known.
        from lightning_sentinel.pipeline.engine import SentinelEngine

        assert self.lightning_module is not None
        self._steps = steps = StepRunner(self.lightning_module, model.layers.entry, model.layers.names, self._has_all)
        guard = self._kept_guard()
        steps.signals = self._signals.counts
        if self._virtual:
            context = self.precision_plugin.forward_context
            return VirtualEngine(model, optimizer, steps, guard, self.root_device, self.activation_checkpointing, context)
        arithmetic = Arithmetic(self.precision_plugin, self.root_device)
        transport = Transport(self.root_device, self.transport)
        response = self.response
        timeout = self.timeout
        zero = self.zero_stage == 1
        return SentinelEngine(model, optimizer, steps, transport, guard, response, timeout, arithmetic, zero)

    def _kept_guard(self) -> Guard | None:
        """The guard, made once: what its verifiers learn outlives a ``validate`` after ``fit``, and goes into later checkpoints."""
        if self.verification is None or self._guard is not None:
            return self._guard
        mesh = self.mesh
        worker = None if self._virtual else self.worker
        self._bans.take_over()
        received = [boundary for boundary in mesh.boundaries if worker is None or boundary.receiver == worker.stage]
        verification = self.verification
        if verification.seed is None:
            # Not kept in the settings, which loggers and files show, nor derived from the seed of the run, which all workers know.
            verification = replace(verification, seed=self.broadcast(secret_seed()))
        self._guard = Guard(mesh, received, worker, verification, self.response, self.ledger, self.root_device)
        self._announcements = Announcements(mesh, self.response.ban_after)
        return self._guard

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Lightning's hook for each loader: a loader of a resumed run stays unopened until the run's position is restored."""
        ready = super().process_dataloader(dataloader)
        resumes = self._trainer.training and self._return_to is not None
        return Unopened(ready) if resumes and not isinstance(ready, _Stateful) else ready

    # ------------------------------------------------------------------------------------------------------------- training

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.verification is not None:
            warn_of_long_warmup(self._trainer, self.verification)
            warn_of_short_warmup(self.mesh, self.micro_batches, self.verification, self.response)
        assert self.lightning_module is not None
        for optimizer in self.optimizers:
            refuse_exchanged_parameters(self.lightning_module, self._cut_parameters, optimizer)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._by_hand:
            self.step += 1
            return super().training_step(*args, **kwargs)
        arguments = self._arguments("training_step", args, kwargs)
        with self._in_step():
            try:
                outcome = self._train_until_settled(arguments)
            finally:
                assert self._steps is not None
                self._steps.make_calls()
            returned = self._returned("training_step")
            if not outcome.skipped:
                self._running_engine.hold_gradients()
        self._take_in(outcome)
        self.step += 1
        if outcome.skipped:
            # With several processes Lightning refuses a step without a loss, because one process might skip alone.
            return None if self._trainer.world_size == 1 else torch.zeros((), device=self.root_device)
        self._has_gradients = True
        if outcome.loss is not None:
            self._last_loss = outcome.loss
        loss = torch.tensor(self._last_loss, device=self.root_device)
        return returned | {"loss": loss} if isinstance(returned, dict) else loss

    def _train_until_settled(self, arguments: tuple[Any, ...]) -> StepOutcome:
        """Plan, run, exchange and settle a batch; again if audits find liars, so that their signals reach no weight."""
        engine = self._running_engine
        tally = self._clean_fractions
        batch = self._split("training_step", arguments)
        excluded: set[Worker] = set()
        while True:
            scale = 1.0 / self._trainer.accumulate_grad_batches
            plan = self._running_planner.training(self.step, batch.sizes, scale, excluded)
            result = engine.run(plan, arguments, batch)
            outcome = engine.exchange(plan, result)
            ruling = engine.settle(plan, outcome)
            if ruling is None:
                self.table = outcome.table
                self.wiring = plan.wiring
                tally.add(None, plan)
                return outcome
            if ruling.excluded:
                # Before callbacks are told of the ruling, so that what they do about it stays.
                engine.rewind()
            self._take_in_ruling(ruling)
            if not ruling.excluded:
                tally.add(ruling.verdict.clean, plan)
                tally.lose(ruling.lost)
                return outcome
            if not ruling.redo:
                # No worker is left that could redo some stage: the batch is left out.
                tally.add(torch.zeros_like(ruling.verdict.clean), plan)
                return outcome
            excluded.update(ruling.excluded)

    def _take_in_ruling(self, ruling: Ruling) -> None:
        """Keep a step's signals, detections and bans, and tell the callbacks and the user."""
        self.table = ruling.verdict.table
        self.wiring = ruling.plan.wiring
        keep_latest(self.detections, ruling.verdict.detections)
        self._bans.keep(ruling.banned)
        announce_detections(self._trainer, ruling.verdict.detections)
        absent = ruling.plan.absent.union(ruling.banned, ruling.excluded)
        self._announcements.tell(self._trainer, ruling, self.ledger, len(Wiring.of(self.mesh, absent).lanes))

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Give the gradients of the schedule, which has run the backward pass already, to Lightning's hooks around ``backward``."""
        assert self.lightning_module is not None
        if self._by_hand:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self._running_engine.release_gradients()
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    # ----------------------------------------------------------------------------------------------------------- evaluation

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._by_hand:
            return super().validation_step(*args, **kwargs)
        return self._evaluate("validation_step", self._arguments("validation_step", args, kwargs))

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._by_hand:
            return super().test_step(*args, **kwargs)
        return self._evaluate("test_step", self._arguments("test_step", args, kwargs))

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._by_hand:
            return super().predict_step(*args, **kwargs)
        arguments = self._arguments("predict_step", args, kwargs)
        with self._in_step():
            batch = self._split("predict_step", arguments)
            plan = self._running_planner.evaluation("predict_step", _loader(arguments), batch.sizes)
            self._running_engine.run(plan, arguments, batch)
            return self._running_engine.returned()

    def _evaluate(self, step: str, arguments: tuple[Any, ...]) -> Any:
        with self._in_step():
            batch = self._split(step, arguments)
            plan = self._running_planner.evaluation(step, _loader(arguments), batch.sizes)
            outcome = self._running_engine.exchange(plan, self._running_engine.run(plan, arguments, batch))
            returned = self._returned(step)
        self._take_in(outcome)
        return returned


def _loader(arguments: Sequence[Any]) -> int | None:
    """The number of the data loader in the arguments of an evaluation step; ``None`` if there is only one."""
    return arguments[2] if len(arguments) > 2 else None
