"""Makes the parts of a strategy that each run has anew: its engine, its data, its steps."""

from __future__ import annotations

from typing import NamedTuple

import lightning as L
from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer

from lightning_sentinel.pipeline.arithmetic import Arithmetic
from lightning_sentinel.pipeline.engine_protocol import Engine
from lightning_sentinel.pipeline.gradients.stage_gradients import GradientOptions
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.pipeline.randomness import SeparateRandomness
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.pipeline.virtual import VirtualEngine
from lightning_sentinel.seeds import secret_seed
from lightning_sentinel.strategy.announcements import Announcements
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.data import PipelineData
from lightning_sentinel.strategy.mesh_steps import MeshSteps
from lightning_sentinel.strategy.optimizer_steps import OptimizerSteps
from lightning_sentinel.strategy.results import SharedResults
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.strategy.signals import DeferredSignals

__all__ = ["RunParts", "make_data", "make_guard", "make_parts"]


class RunParts(NamedTuple):
    """The parts of the strategy that each run has anew, beside its data and its engine."""

    steps: MeshSteps
    optimizer_steps: OptimizerSteps


def make_guard(run: RunState, bans: BanKeeper) -> Guard | None:
    """The guard of the first run, which later runs keep: what its verifiers learn outlives a ``validate`` after ``fit``.

    Args:
        run: the state of the run.
        bans: bans of earlier runs.

    Returns:
        ``None`` if nothing is verified.
    """
    settings = run.settings
    verification = settings.verification
    if verification is None or run.guard is not None:
        return run.guard
    processes = run.processes
    mesh = run.mesh
    worker = None if settings.virtual else processes.worker
    bans.take_over()
    received = [boundary for boundary in mesh.boundaries if worker is None or boundary.receiver == worker.stage]
    # Not kept in the settings, which loggers and files show, nor derived from the seed of the run, which all workers know.
    secret = processes.broadcast(secret_seed()) if verification.seed is None else None
    return Guard(mesh, received, worker, verification, settings.response, run.ledger, processes.device, secret)


def make_data(run: RunState, trainer: L.Trainer, model: StageModel) -> PipelineData:
    """Make the data of a run, before its optimizer: ``trainer.estimated_stepping_batches`` asks for loaders.

    Args:
        run: the state of the run.
        trainer: the Trainer of the run.
        model: the module, cut into stages.
    """
    steps = StepRunner(trainer.lightning_module, model.layers.entry, model.layers.names, run.has_all_stages)
    return PipelineData(run, trainer, steps)


def make_parts(
    run: RunState,
    trainer: L.Trainer,
    model: StageModel,
    data: PipelineData,
    optimizer: Optimizer | None,
    signals: DeferredSignals,
    bans: BanKeeper,
    announcements: Announcements,
) -> RunParts:
    """Make the engine of a run, and the parts that work with it.

    Args:
        run: the state of the run, which gets the engine.
        trainer: the Trainer of the run.
        model: the module, cut into stages.
        data: the data of the run.
        optimizer: the user's optimizer; ``None`` for evaluation.
        signals: the process signals that this process has received.
        bans: keeps bans for later runs.
        announcements: tells the user of bans.
    """
    processes = run.processes
    precision = trainer.precision_plugin
    steps = data.steps
    steps.signals = signals.counts
    run.engine = _make_engine(run, model, optimizer, steps, precision)
    run.randomness = SeparateRandomness(run.seed, processes.rank, processes.device)
    results = SharedResults(run, trainer, signals)
    mesh_steps = MeshSteps(run, trainer, data, results, bans, announcements)
    return RunParts(mesh_steps, OptimizerSteps(run, trainer, mesh_steps, precision))


def _make_engine(run: RunState, model: StageModel, optimizer: Optimizer | None, steps: StepRunner, precision: Precision) -> Engine:
    """The engine that the settings ask for."""
    # Imported here, because DeepSpeed must not be imported before its accelerator is known.
    from lightning_sentinel.pipeline.engine import SentinelEngine

    settings = run.settings
    device = run.processes.device
    if settings.virtual:
        context = precision.forward_context
        return VirtualEngine(model, optimizer, steps, run.guard, device, settings.activation_checkpointing, context)
    arithmetic = Arithmetic(precision, device)
    transport = Transport(device, settings.transport)
    options = GradientOptions(settings.response, settings.zero_stage == 1, settings.timeout)
    return SentinelEngine(model, optimizer, steps, transport, run.guard, options, arithmetic, run.processes.credentials())
