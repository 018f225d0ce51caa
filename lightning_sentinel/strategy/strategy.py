"""The Lightning strategy: an adapter between Lightning's hooks and the parts of a verified pipeline.

A training step: Lightning's loop calls :meth:`SentinelStrategy.training_step`; the engine runs the schedule of all micro-batches,
and each signal is verified on receipt; one collective gives all ranks the scores, from which they derive the same verdicts; then
Lightning's hooks run in their usual order around the reduction of gradients, clipping and the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.deepspeed_setup import prepare
from lightning_sentinel.pipeline.logs import silence_misleading_warnings
from lightning_sentinel.pipeline.randomness import seed_data, seed_of_state
from lightning_sentinel.strategy.added_callbacks import add_callbacks
from lightning_sentinel.strategy.announcements import Announcements, log_settings
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.checkpointed import CheckpointedStrategy
from lightning_sentinel.strategy.data import PipelineData, sampler_arguments
from lightning_sentinel.strategy.parts import RunParts, make_data, make_guard, make_parts
from lightning_sentinel.strategy.processes import Processes
from lightning_sentinel.strategy.protection import protection
from lightning_sentinel.strategy.refusals import (
    refuse_before_processes,
    refuse_exchanged_parameters,
    require_optimizer,
    requiring_one_optimizer,
    warn_of_long_warmup,
    warn_of_short_warmup,
)
from lightning_sentinel.strategy.results import gather_predictions
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.strategy.settings import StrategySettings
from lightning_sentinel.strategy.signals import DeferredSignals
from lightning_sentinel.strategy.summary import print_mesh
from lightning_sentinel.strategy.throughput import count_pipelines

__all__ = ["SentinelStrategy"]


class SentinelStrategy(CheckpointedStrategy):
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
        identity: file of this worker's private key, made if it is missing; ``{rank}`` in the path is the rank, for workers that
            share a file system. Bans then follow the key. ``None`` draws a key for this run; ``"unsigned"`` signs nothing, so that
            nobody can be shown who said what, and does without the extra ``trust``.
        known_workers: file of the public keys that are admitted, one a line, with comments; ``None`` admits any.
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
        identity: str | Path | None = None,
        known_workers: str | Path | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        settings = StrategySettings(
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
            identity=identity,
            known_workers=known_workers,
        )
        run = RunState(Processes(settings))
        super().__init__(
            run,
            BanKeeper(response, run.ledger),
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.adversary: Adversary | None = None
        """A simulated attacker, set by :class:`AttackInjector`."""
        self._signals = DeferredSignals(self._processes.watching)
        self._announcements = Announcements(response.ban_after)
        self._data: PipelineData | None = None
        self._parts: RunParts | None = None

    # --------------------------------------------------------------------------------------------------------------- set-up

    @override
    def setup_environment(self) -> None:
        """Lightning's hook before the user's ``setup`` hooks: refuse what cannot work, and connect the processes."""
        trainer = self._trainer
        refuse_before_processes(trainer, self._settings, self.mesh, self._layer_sync is not None, self.precision_plugin)
        self._stage.forget()
        self._processes.identify()
        super().setup_environment()
        add_callbacks(self._run, trainer, self._signals)
        with self._processes.watching():
            hosts = self._processes.meet()
            prepare(self.root_device, None if self._settings.virtual else self.timeout, self.local_rank)
            self._bans.read(self.mesh, self.global_rank, hosts, self._processes.keys, self.broadcast)
        # Before data is prepared and split, so that all ranks split it alike.
        self._processes.share_generators()
        self._run.seed = seed_of_state()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        """Lightning's hook after ``configure_model``: cut the module, and make the optimizer and the engine."""
        module = self._module
        run = self._run
        virtual = self._settings.virtual
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not virtual:
            count_pipelines(trainer, self.mesh)
        with self._processes.watching():
            model = self._take_stage()
            # Stages may have drawn the initial values of their own layers.
            self._processes.share_generators()
            seed_data(run.seed, self.worker.replica)
            self._data = make_data(run, trainer, model)
            if fitting:
                with self._stage.whole(lambda: self.optimizers), requiring_one_optimizer(module, run.has_all_stages):
                    self.setup_optimizers(trainer)
                if not virtual:
                    require_optimizer(module, self.optimizers)
            self.setup_precision_plugin()
            run.guard = make_guard(run, self._bans)
            optimizer = self.optimizers[0] if fitting else None
            kept = self._signals, self._bans, self._announcements
            self._parts = make_parts(run, trainer, model, self._data, optimizer, *kept)
            run.running_engine.adversary = self.adversary
        silence_misleading_warnings()
        if fitting:
            log_settings(trainer, self._settings.plain)
        if fitting and self.is_global_zero:
            print_mesh(model, protection(self.mesh, self.verification, self.response))

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Lightning's hook when a run fails: report the failure to other ranks, and ban the sender of a malformed message."""
        if not self._processes.has_met:
            return
        self._processes.report_failure(exception)
        if isinstance(exception, MalformedMessageError) and exception.rank is not None:
            self._bans.keep_malformed(self.mesh.worker(exception.rank), self.step)

    @override
    def teardown(self) -> None:
        """Lightning's hook at the end of a run."""
        self._run.engine = None  # the module may outlive the run, and keeps its last Trainer
        self._data = None
        self._parts = None
        if self._stage.is_building:
            # The run has failed before the module was cut, and tensors without values cannot be moved to the host.
            self._lightning_module = None
        super().teardown()

    # ----------------------------------------------------------------------------------------------------------------- data

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Read by Lightning, which puts a distributed sampler into each loader."""
        return sampler_arguments(self._run)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Lightning's hook for each loader."""
        return self._data_of_run.process(dataloader, self._resumption.is_pending)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Lightning's hook for each batch."""
        if self._data is not None:  # users may call this outside of a run
            self._data.keep_loaded(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    # ------------------------------------------------------------------------------------------------------- steps, weights

    @override
    def on_train_start(self) -> None:
        """Lightning's hook after callbacks' ``on_train_start``: look at what these may have changed, and resume."""
        self._resumption.return_to_position(self._trainer)
        if self.verification is not None:
            warn_of_long_warmup(self._trainer, self.verification)
            warn_of_short_warmup(self.mesh, self.micro_batches, self.verification, self.response)
        for optimizer in self.optimizers:
            refuse_exchanged_parameters(self._module, self._stage.parameters, optimizer)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Lightning's hook before each batch: in a new epoch both ends of a pipeline are compared again."""
        if batch_idx == 0:
            self._data_of_run.compare_again("training_step")

    @override
    def on_validation_start(self) -> None:
        """Lightning's hook before a validation: both ends of a pipeline are compared again."""
        self._data_of_run.compare_again("validation_step")

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's hook for a batch: forward and backward passes, verified."""
        if self._by_hand:
            self._run.step += 1
            return super().training_step(*args, **kwargs)
        return self._of_run.steps.train(args, kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning's hook after ``training_step``, which has run the backward pass: give its hooks the gradients."""
        if self._by_hand:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        self._run.running_engine.gradients.release()
        return self.precision_plugin.post_backward(closure_loss, self._module)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Lightning's hook for an optimizer step; the closure runs ``training_step`` and ``backward``."""
        if self._by_hand:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        return self._of_run.optimizer_steps.step(optimizer, closure, kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's hook for a batch of a validation."""
        if self._by_hand:
            return super().validation_step(*args, **kwargs)
        return self._of_run.steps.evaluate("validation_step", args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's hook for a batch of a test."""
        if self._by_hand:
            return super().test_step(*args, **kwargs)
        return self._of_run.steps.evaluate("test_step", args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's hook for a batch of a prediction."""
        if self._by_hand:
            return super().predict_step(*args, **kwargs)
        return self._of_run.steps.predict(args, kwargs)

    @override
    def on_train_end(self) -> None:
        """Lightning's hook at the end of a training: ranks have drawn different numbers in it."""
        self._processes.share_generators()

    @override
    def on_test_end(self) -> None:
        """Lightning's hook at the end of a test."""
        self._processes.share_generators()

    @override
    def on_validation_end(self) -> None:
        """Lightning's hook at the end of a validation."""
        if self._trainer.state.fn == TrainerFn.VALIDATING:
            self._processes.share_generators()

    @override
    def on_predict_end(self) -> None:
        """Lightning's hook at the end of a prediction."""
        self._processes.share_generators()
        gather_predictions(self._run, self._trainer)

    @property
    def _data_of_run(self) -> PipelineData:
        assert self._data is not None, "it is made in setup"
        return self._data

    @property
    def _of_run(self) -> RunParts:
        assert self._parts is not None, "they are made in setup"
        return self._parts
