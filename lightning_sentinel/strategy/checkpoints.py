"""Saves a run's state: to one file, or to one part per stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_sentinel.errors import ConfigurationError, WorkerLostError
from lightning_sentinel.pipeline.checkpoints import full as stage_files
from lightning_sentinel.pipeline.checkpoints.copies import odd_copies
from lightning_sentinel.pipeline.checkpoints.files import local_path
from lightning_sentinel.pipeline.checkpoints.full import SECTION
from lightning_sentinel.pipeline.checkpoints.sharded import Destination
from lightning_sentinel.strategy import averaging
from lightning_sentinel.strategy.building import StageBuilder
from lightning_sentinel.strategy.resuming import believed_parts
from lightning_sentinel.strategy.run_state import RunState

__all__ = ["CheckpointWriter"]

_MOST_BYTES_OF_GENERATORS = 2**20


class CheckpointWriter:
    """Saves a module that is cut into stages, and the state of its run.

    Args:
        run: the state of the run.
        stage: the stage of this process.
    """

    def __init__(self, run: RunState, stage: StageBuilder) -> None:
        self._run = run
        self._stage = stage
        self._virtual = run.settings.virtual
        self._sharded = run.settings.sharded
        self._gathered: dict[str, Any] | None = None
        """The module's state, gathered from all stages, while it is saved."""
        self._saved_groups: list[list[str]] = []
        """Names of the parameters in each group of the optimizer that was saved last."""

    def module_state(self, module: L.LightningModule) -> dict[str, Any]:
        """The unsplit module's state on rank zero, empty elsewhere; a collective. If sharded, this stage's state on each rank."""
        self._require_no_step("Trainer.save_checkpoint", ", or by ModelCheckpoint(every_n_train_steps=...)")
        state = module.state_dict()
        if self._stage.is_cut:
            self._compare_copies(module)
        if self._sharded or not self._stage.is_cut:
            # Before any run the module is whole, and every process has it.
            return state
        self._gathered = self._whole_state(state)
        return self._gathered

    def whole_state(self, module: L.LightningModule | None) -> dict[str, Any]:
        """The state of the whole module on rank zero, on the host; empty on other ranks; a collective.

        Raises:
            ConfigurationError: in the middle of a step, or before there is a module.
        """
        if module is None:
            raise ConfigurationError(
                "whole_state_dict() was called before a run, when the strategy has no module yet. Call it in a hook or after"
                " trainer.fit; before any run the module is whole, and has its state_dict()."
            )
        self._require_no_step("whole_state_dict()")
        state = module.state_dict()
        if not self._stage.is_cut:
            return state
        self._compare_copies(module)
        return self._whole_state(state)

    def _compare_copies(self, module: L.LightningModule) -> None:
        """Find out whose copy of its stage's weights is not that of most, so that it is not the one that is saved; a collective."""
        run = self._run
        if self._virtual or run.mesh.replicas == 1:
            return
        with run.at_work():
            odd = odd_copies(module.parameters(), run.mesh, run.ledger.banned)
        news = odd - run.ledger.odd_copies
        run.ledger.odd_copies = odd
        if news:
            rank_zero_warn(
                f"The weights of {', '.join(map(str, sorted(news)))} are not those that most replicas of the same stage have, bit"
                " for bit. They are not saved: another replica speaks for the stage. Either a device errs, or computes in another"
                " way than the others, or a worker alters its copy. Look at the machine, and leave it out with"
                " Response(banned=[...]) if it is not known why."
            )

    def _require_no_step(self, what: str, otherwise: str = "") -> None:
        if self._run.in_a_step and not self._virtual:
            raise ConfigurationError(
                f"{what} was called in the middle of a step, by training_step or the like or by a signal handler,"
                " while other ranks wait for what this one sends. Call it between batches and on all ranks: from"
                f" on_train_batch_end{otherwise}."
            )

    def _whole_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        model = self._stage.model
        parts = enumerate(tensors for _, tensors in self._run.from_stages({}, state))
        merged = {name: tensors[name] for stage, tensors in parts for name in tensors if model.speaks_for(stage, name)}
        return {name: merged[name] for name in stage_files.in_order(merged, model.state_names)}

    def _whole_again(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Gather from all stages the state that a hook has put in place of the module's; a collective.

        Callbacks that save averaged or pruned weights instead make them from the module, of which a process has one stage. A hook
        that only drops some gathered entries needs no gathering: it has all entries on rank zero.
        """
        if not self._run.processes.any_rank(state is not self._gathered):
            return dict(state)
        merged = {**state, **self._whole_state(state)}
        return {name: merged[name] for name in stage_files.in_order(merged, self._stage.model.state_names)}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The unsplit module's optimizer state on rank zero, empty elsewhere; a collective. If sharded, this stage's part."""
        plain, tensors = self._whole_stage(*stage_files.optimizer_part(optimizer, self._stage.parameter_names()))
        if self._sharded:
            return {"plain": plain, "tensors": tensors}
        parts = self._run.from_stages(plain, tensors)
        if not parts:
            return {}
        # On a virtual mesh no rank sent the state, so its form is not checked; LBFGS keeps lists of tensors.
        believed = parts if self._virtual else believed_parts(self._run, self._stage, parts)
        state, self._saved_groups = stage_files.merge_optimizer_states(
            believed, _options(optimizer), self._stage.model.parameter_names
        )
        return state

    def _whole_stage(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> stage_files.StageState:
        """The optimizer state of this rank's whole stage, on the rank that saves the stage; a collective."""
        run = self._run
        if run.settings.zero_stage == 0:
            return plain, tensors
        mesh = run.mesh
        stage = run.processes.worker.stage
        banned = run.ledger.banned
        ranks = [rank for rank in mesh.stage_ranks(stage) if mesh.worker(rank) not in banned]
        with run.at_work():
            parts = stage_files.collect(plain, tensors, ranks, to=run.speakers[stage])
        return stage_files.join_optimizer_parts(parts) if parts else (plain, {})

    def save(
        self,
        checkpoint: dict[str, Any],
        path: Any,
        module: L.LightningModule | None,
        write: Callable[[dict[str, Any]], None],
        options: Any | None = None,
    ) -> None:
        """Save a checkpoint; a collective.

        Args:
            checkpoint: the checkpoint that Lightning has made.
            path: the file, or the directory of a sharded checkpoint.
            module: the user's module, connected to a Trainer if there is a run.
            write: writes an unsharded checkpoint with Lightning's plugin, on rank zero.
            options: the storage options of that plugin.

        Raises:
            ConfigurationError: if a sharded checkpoint cannot be at this path.
            WorkerLostError: if another rank could not save.
        """
        if self._sharded and (options is not None or local_path(path) is None):
            raise ConfigurationError(
                f"A sharded checkpoint is a directory on a disk that all machines share, and {str(path)!r} is none. Save to"
                " such a path, or use SentinelStrategy(state_dict_type='full')."
            )
        if not self._stage.is_cut:
            write(checkpoint)
            return
        assert module is not None
        trainer = module.trainer
        # A copy, because hooks may keep the dict that they were given.
        checkpoint = dict(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint[SECTION] = self._section(trainer)
        if self._sharded:
            self._save_parts(checkpoint, path, trainer)
            return
        checkpoint["state_dict"] = self._whole_again(checkpoint["state_dict"])
        self._gathered = None
        failure: Exception | None = None
        try:
            write(checkpoint)
        except Exception as error:
            failure = error
        self._agree_that_saved(path, failure)

    def _section(self, trainer: L.Trainer) -> dict[str, Any]:
        """What this strategy adds to a checkpoint."""
        run = self._run
        return {
            "step": run.step,
            "mesh": [run.mesh.stages, run.mesh.replicas],
            "ledger": run.ledger.state_dict(),
            "verifiers": self._learned(),
            "tolerances": {} if run.guard is None else run.guard.tolerances.state_dict(),
            "optimizer_groups": self._saved_groups,
            "seed": run.seed,
            "processes": run.processes.world_size,
            "generators": self._generators(trainer),
            "settings": run.settings.plain,
        }

    def _learned(self) -> dict[str, Any]:
        parts = self._run.from_stages({}, self._run.guard.state_dict() if self._run.guard is not None else {})
        own: list[dict[str, Any]] = [{} for _ in parts]
        for stage, (_, tensors) in enumerate(parts):
            prefixes = tuple(f"{boundary.name}/" for boundary in self._run.mesh.boundaries if boundary.receiver != stage)
            own[stage] = {name: value for name, value in tensors.items() if self._virtual or not name.startswith(prefixes)}
        return {name: value for tensors in own for name, value in tensors.items()}

    def _generators(self, trainer: L.Trainer) -> dict[int, dict[str, Any]]:
        """The generator states of all ranks that are not banned, on rank zero."""
        run = self._run
        processes = run.processes
        assert run.randomness is not None, "it is made with the engine"
        states = run.position.states(trainer, run.randomness, processes.device)
        ranks = [r for r in range(processes.world_size) if self._virtual or run.mesh.worker(r) not in run.ledger.banned]
        with run.at_work():
            parts = stage_files.collect({}, states, ranks, _MOST_BYTES_OF_GENERATORS)
        return {rank: tensors for rank, (_, tensors) in zip(ranks, parts)}

    def _save_parts(self, checkpoint: dict[str, Any], path: Any, trainer: L.Trainer) -> None:
        """Each stage writes its part; then rank zero writes the index that makes the parts a checkpoint."""
        run = self._run
        processes = run.processes
        first = processes.rank == 0
        failure: Exception | None = None
        destination: Destination | None = None
        if first:
            try:
                destination = Destination.prepare(Path(str(local_path(path))))
            except Exception as error:
                failure = error
        with run.at_work():
            prepared = processes.broadcast([] if destination is None else list(destination))
        if not prepared:
            self._agree_that_saved(path, failure)
        destination = Destination(*prepared)
        states = {key: checkpoint.pop(key) for key in ("state_dict", averaging.CURRENT) if key in checkpoint}
        saved = checkpoint.pop("optimizer_states", [])
        described: dict[str, Any] = {}
        speaking = run.speakers
        if self._virtual or processes.rank in speaking:
            try:
                stage = 0 if self._virtual else processes.worker.stage
                parts = [(one["plain"], one["tensors"]) for one in saved]
                described = destination.write_part(stage, states, parts)
            except Exception as error:
                failure = error
                described = {"failure": f"{type(error).__name__}: {error}"}
        with run.at_work():
            written = [plain for plain, _ in stage_files.collect(described, {}, speaking)]
        if first:
            lost = next((rank for rank, part in zip(speaking, written) if "failure" in part), None)
            try:
                if lost is None:
                    speaks_for = self._stage.model.speaks_for
                    believed = [destination.believed(stage, part, partial(speaks_for, stage)) for stage, part in enumerate(written)]
                    names = [name for part in believed for name in part["state_names"]]
                    destination.publish(checkpoint, believed, self._index(names, trainer.optimizers[: len(saved)]))
                else:
                    failure = failure or self._not_saved(lost, path, written[speaking.index(lost)]["failure"])
                    destination.abandon()
            except Exception as error:
                failure = error
                destination.abandon()
        self._agree_that_saved(path, failure)

    def _index(self, names: Collection[str], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        model = self._stage.model
        return {
            "state_names": stage_files.in_order(names, model.state_names),
            "parameter_names": list(model.parameter_names),
            "options": [_options(optimizer) for optimizer in optimizers],
        }

    def _agree_that_saved(self, path: Any, failure: Exception | None) -> None:
        """Raise on all ranks if rank zero could not save, so that no rank goes on and waits for ranks that have ended."""
        with self._run.at_work():
            reason = self._run.processes.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if reason is not None:
            raise self._not_saved(0, path, reason)

    def _not_saved(self, rank: int, path: Any, reason: str) -> WorkerLostError:
        return WorkerLostError(
            f"The run cannot go on: rank {rank}, {self._run.mesh.worker(rank)}, could not save the checkpoint {path}: {reason}."
            " Start it again from an earlier checkpoint once the cause is gone.",
            rank=rank,
        )


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group: all entries but its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
