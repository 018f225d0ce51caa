"""Refuses what a pipeline cannot do: with a remedy, on all ranks, before any rank waits for another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import lightning as L
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_sentinel.aggregation.rules import tolerable
from lightning_sentinel.config import DEFAULT_AUDIT_RATE, Response, Verification
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.strategy.averaging import refuse_unequal_epochs
from lightning_sentinel.strategy.protection import shortcoming
from lightning_sentinel.strategy.settings import StrategySettings
from lightning_sentinel.verification.calibration import values_needed, values_of_warmup

__all__ = [
    "check_precision",
    "check_replicas",
    "refuse_before_processes",
    "refuse_exchanged_parameters",
    "refuse_launch",
    "refuse_pruning",
    "refuse_resumed_finetuning",
    "refuse_synchronised_layers",
    "refuse_unsupported",
    "require_optimizer",
    "requiring_one_optimizer",
    "warn_of_long_warmup",
    "warn_of_short_warmup",
]


_FEWEST_TO_OUTVOTE = 3
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


def check_replicas(mesh: Mesh, verification: Verification | None, response: Response) -> None:
    """Raise ``ConfigurationError``, or warn, if there are too few replicas for the response."""
    if response.aggregation != "mean" and mesh.replicas < _FEWEST_TO_OUTVOTE:
        raise ConfigurationError(
            f"Response(aggregation={response.aggregation!r}) needs at least {_FEWEST_TO_OUTVOTE} replicas, because of fewer no"
            f" minority can be outvoted; this mesh has {mesh.replicas}. Use replicas={_FEWEST_TO_OUTVOTE} or more, or 'mean'."
        )
    most = tolerable(mesh.replicas, rule=response.aggregation)
    if response.tolerated is not None and response.tolerated > most:
        need = "2 f + 2 < n" if "krum" in response.aggregation else "2 f < n"
        raise ConfigurationError(
            f"Response(aggregation={response.aggregation!r}, tolerated={response.tolerated}) promises what {mesh.replicas} replicas"
            f" cannot keep: with f of n workers that send anything it needs {need}. Use tolerated={most} or less, or more replicas."
        )
    for worker in response.banned:
        mesh.rank(Worker.of(worker, "Response.banned"))
    if response.banned and verification is None:
        raise ConfigurationError(
            f"Response(banned={list(response.banned)}) has no effect with verification=None, where nobody is left out. Set a"
            " Verification, or leave the machines out of the run."
        )
    if verification is None:
        return
    if response.audit_rate not in (None, DEFAULT_AUDIT_RATE) and mesh.replicas == 1:
        raise ConfigurationError(
            f"Response(audit_rate={response.audit_rate}) needs at least 2 replicas, because a signal is recomputed by another"
            f" worker of its stage; this mesh has {mesh.replicas}. Use replicas=2 or more, or audit_rate=None."
        )
    if (why := shortcoming(mesh, verification, response)) is not None:
        rank_zero_warn(why)


def warn_of_short_warmup(mesh: Mesh, micro_batches: int, verification: Verification, response: Response) -> None:
    """Warn if fences are fitted to fewer values than their false-positive rate needs."""
    signals = mesh.replicas * micro_batches
    seen = values_of_warmup(verification, signals)
    needed = values_needed(verification)
    if mesh.stages == 1 or seen >= needed:
        return
    if response.audit_rate_of(mesh) is not None:
        until = "honest signals will be flagged, and recomputed, more often than that"
    elif response.on_flag == "log":
        until = "honest signals will be flagged more often than that"
    else:
        until = "nothing is left out and nobody is banned, except for values that are not finite"
    enough = next(steps for steps in count(1) if values_of_warmup(replace(verification, warmup_steps=steps), signals) >= needed)
    rank_zero_warn(
        f"Verification(warmup_steps={verification.warmup_steps}) is short: fences see {seen} signals of each boundary in it, and a"
        f" false_positive_rate of {verification.false_positive_rate} takes {needed}. Until they have seen as many, {until}. Use"
        f" warmup_steps={enough} or more."
    )


def warn_of_long_warmup(trainer: L.Trainer, verification: Verification) -> None:
    """Warn if the run ends before any worker can be flagged."""
    batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
    if batches <= verification.warmup_steps:
        rank_zero_warn(
            f"Verification(warmup_steps={verification.warmup_steps}) outlasts this run of {batches:g} training batches: nobody"
            " will be flagged, except for values that are not finite. Train for longer, or use a shorter warm-up."
        )


def refuse_launch(name: str, virtual: bool, world_size: int, has_trainer: bool) -> None:
    """Raise ``ConfigurationError`` where processes cannot be started, before any is.

    Args:
        name: the name of the strategy's class.
        virtual: whether the whole mesh is in one process.
        world_size: number of processes of the Trainer.
        has_trainer: whether the strategy belongs to another Trainer already.
    """
    if virtual and world_size > 1:
        raise ConfigurationError(
            f"A virtual mesh is in one process, but the Trainer has {world_size}. Use Trainer(devices=1), or engine='process'."
        )
    if has_trainer:
        raise ConfigurationError(
            f"This {name} belongs to another Trainer already. It keeps who is banned, what was detected and what was learned of one"
            " run's workers, so make a new one for every Trainer."
        )
    if _IS_INTERACTIVE and not virtual:
        raise ConfigurationError(
            f"{name} starts a process for each worker by running the script again, and in a notebook or an interactive session"
            " there is none. Use Trainer(strategy='sentinel_virtual', devices=1) or SentinelStrategy(engine='virtual'), which have"
            " the whole mesh in this process, or write a script."
        )


def refuse_before_processes(
    trainer: L.Trainer, settings: StrategySettings, mesh: Mesh, synchronises: bool, precision: Precision
) -> None:
    """Raise ``ConfigurationError`` for what cannot work in a run, before its processes are connected.

    Args:
        trainer: the Trainer of the run, which has its module.
        settings: the strategy's settings.
        mesh: all workers.
        synchronises: whether layers are to be synchronised over ranks.
        precision: the Trainer's precision plugin.
    """
    module = trainer.lightning_module
    whole = settings.virtual and mesh.stages == 1
    refuse_unsupported(module, trainer, whole)
    refuse_sharded_by_hand(module, settings.sharded, whole)
    refuse_pruning(trainer, mesh, settings.virtual)
    refuse_synchronised_layers(synchronises, settings.virtual)
    check_precision(precision, settings.verification, settings.virtual)


def refuse_unsupported(module: L.LightningModule, trainer: L.Trainer, whole: bool) -> None:
    """Raise ``ConfigurationError`` for settings of the module or the Trainer that a pipeline would have to ignore.

    Args:
        module: the user's module.
        trainer: the Trainer of the run.
        whole: whether one process has the only stage.
    """
    if not whole and not module.automatic_optimization and trainer.state.fn == TrainerFn.FITTING:
        raise ConfigurationError(
            f"{type(module).__name__} uses manual optimization, but a pipeline's backward pass is run by its schedule. Set"
            " self.automatic_optimization = True and let training_step return the loss; or, without a pipeline, train with"
            " SentinelStrategy(stages=1, engine='virtual')."
        )
    refuse_unequal_epochs(trainer, module)


def refuse_synchronised_layers(synchronises: bool, virtual: bool) -> None:
    """Raise ``ConfigurationError`` for ``Trainer(sync_batchnorm=True)``; on a virtual mesh a BatchNorm sees all replicas anyway."""
    if synchronises and not virtual:
        raise ConfigurationError(
            "Trainer(sync_batchnorm=True) would let replicas wait for each other in every layer, but pipelines reach a layer at"
            " different times, and banned workers never. Leave it out, or use a norm without statistics, such as GroupNorm."
        )


def refuse_pruning(trainer: L.Trainer, mesh: Mesh, virtual: bool) -> None:
    """Raise ``ConfigurationError`` for ``ModelPruning`` where a process has one stage: it compares the layers of all stages."""
    pruning = any(isinstance(callback, ModelPruning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if pruning and mesh.stages > 1 and not virtual:
        raise ConfigurationError(
            f"ModelPruning compares the weights of all layers, and each process has those of one of {mesh.stages} stages, so it"
            " would prune by weights that nobody trains. Use stages=1 or engine='virtual', or prune in your own callback what"
            " pl_module has on each rank, with torch.nn.utils.prune."
        )


def refuse_exchanged_parameters(module: L.LightningModule, before: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Raise ``ConfigurationError`` if the optimizer was left with parameters that the module no longer has.

    Args:
        module: the module of this process.
        before: the module's parameters when it was cut, by name.
        optimizer: the optimizer that was made with those parameters.
    """
    now = {id(parameter) for parameter in module.parameters()}
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    gone = [name for name, parameter in before.items() if id(parameter) in trained - now]
    if gone:
        raise ConfigurationError(
            f"{', '.join(gone[:3])} {'is' if len(gone) == 1 else 'are'} trained by {type(optimizer).__name__}, but"
            f" {type(module).__name__} has exchanged {'it' if len(gone) == 1 else 'them'} for something else since the optimizer"
            " was made, so that training would change nothing. Call weight_norm and the like in __init__, configure_model or setup,"
            " and not in on_fit_start or on_train_start."
        )


def check_precision(precision: Precision, verification: Verification | None, virtual: bool) -> None:
    """Raise ``ConfigurationError`` for a precision in which a pipeline cannot train, or its signals cannot be judged."""
    if precision.precision not in _PRECISIONS or type(precision) not in (Precision, MixedPrecision, HalfPrecision):
        raise ConfigurationError(
            f"SentinelStrategy does not support {type(precision).__name__}(precision={precision.precision!r}). Use"
            f" Trainer(precision=...) with one of {', '.join(map(repr, _PRECISIONS))}."
        )
    if precision.precision == "16-mixed" and (virtual or verification is not None):
        raise ConfigurationError(
            "Trainer(precision='16-mixed') needs engine='process' and verification=None: its gradients overflow every now and then,"
            " which is what an attack looks like. Use precision='bf16-mixed', which needs no loss scaling, or verification=None."
        )


def refuse_sharded_by_hand(module: L.LightningModule, sharded: bool, whole: bool) -> None:
    """Raise ``ConfigurationError`` for a sharded checkpoint that would have to split the states of several optimizers by name.

    Args:
        module: the user's module.
        sharded: whether each stage writes its own part of a checkpoint.
        whole: whether one process has the only stage.
    """
    if sharded and whole and not module.automatic_optimization:
        raise ConfigurationError(
            f"{type(module).__name__} uses manual optimization, and a sharded checkpoint has the state of one optimizer. Use"
            " SentinelStrategy(state_dict_type='full'): with stages=1 nothing is cut."
        )


def refuse_resumed_finetuning(trainer: L.Trainer, mesh: Mesh) -> None:
    """Raise ``ConfigurationError`` if a callback would look for the parameters of all stages on each rank."""
    if mesh.stages > 1 and trainer.state.fn == TrainerFn.FITTING:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BaseFinetuning):
                raise ConfigurationError(
                    f"{type(callback).__name__} cannot go on from a checkpoint: it keeps the names of all parameters, and a process"
                    " has only those of its stage. Load the weights only: fit Model.load_from_checkpoint(path), without ckpt_path."
                )


@contextmanager
def requiring_one_optimizer(module: L.LightningModule, whole: bool) -> Iterator[None]:
    """A context for ``setup_optimizers``: Lightning refuses several optimizers, but its advice, manual optimization, does not help.

    Args:
        module: the user's module.
        whole: whether one process has the only stage, where Lightning's advice helps.
    """
    try:
        yield
    except RuntimeError as error:
        if whole or "multiple optimizers" not in str(error):
            raise
        raise ConfigurationError(
            f"{type(module).__name__}.configure_optimizers returned more than one optimizer; a pipeline needs exactly one. Use one"
            " with several parameter groups."
        ) from error


def require_optimizer(module: L.LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ConfigurationError`` if ``configure_optimizers`` made no optimizer that steps without a closure after a schedule.

    If it made no optimizer at all, Lightning puts in a mock.
    """
    if not optimizers or not isinstance(optimizers[0], Optimizer) or isinstance(optimizers[0], _MockOptimizer):
        raise ConfigurationError(
            f"{type(module).__name__}.configure_optimizers returned no optimizer, and a pipeline cannot train without one. Return a"
            " torch.optim.Optimizer."
        )
    closure = inspect.signature(optimizers[0].step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        kind = type(optimizers[0]).__name__
        raise ConfigurationError(
            f"{kind}.step() asks for a closure, with which to evaluate the loss anew as often as it likes, but a pipeline between"
            " processes has run each batch's schedule by then. Use an optimizer whose step() needs none, such as torch.optim.AdamW,"
            f" in place of {kind}, or SentinelStrategy(engine='virtual')."
        )
