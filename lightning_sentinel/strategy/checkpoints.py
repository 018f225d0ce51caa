"""The part of the strategy that saves a run's state to one file or to one part per stage, and loads it into stages again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError, WorkerLostError
from lightning_sentinel.pipeline.checkpoints import full as stage_files
from lightning_sentinel.pipeline.checkpoints.files import AtomicCheckpointIO, local_path, require_checkpoint
from lightning_sentinel.pipeline.checkpoints.full import SECTION
from lightning_sentinel.pipeline.checkpoints.sharded import Destination, ShardedCheckpoint
from lightning_sentinel.strategy import averaging
from lightning_sentinel.strategy.refusals import refuse_resumed_finetuning
from lightning_sentinel.strategy.resuming import ResumedRuns

__all__ = ["StageCheckpoints"]

_MOST_BYTES_OF_GENERATORS = 2**20


class StageCheckpoints(ResumedRuns):
    """Saves and loads a module that is cut into stages."""

    _gathered: dict[str, Any] | None = None
    """The module's state, gathered from all stages, while it is saved."""
    _saved_groups: list[list[str]] = []
    """Names of the parameters in each group of the optimizer that was saved last."""
    _saved_names: list[str] | None = None
    """All keys of the module in the loaded checkpoint, if only this stage's were read; ``None`` if all were."""

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """The user's plugin, or one that never leaves a half-written file."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif getattr(self._checkpoint_io, "checkpoint_io", self) is None:
            # Lightning's AsyncCheckpointIO, which leaves the writing to another plugin.
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # type: ignore[attr-defined]
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO) -> None:
        self._checkpoint_io = checkpoint_io

    # --------------------------------------------------------------------------------------------------------------- saving

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The unsplit module's state on rank zero, empty elsewhere; a collective. If sharded, this stage's state on each rank."""
        assert self.lightning_module is not None
        self._require_no_step("Trainer.save_checkpoint", ", or by ModelCheckpoint(every_n_train_steps=...)")
        state = self.lightning_module.state_dict()
        if self._sharded or self._stage_model is None:
            # Before any run the module is whole, and every process has it.
            return state
        self._gathered = self._whole_state(state)
        return self._gathered

    def whole_state_dict(self) -> dict[str, Any]:
        """The state of the whole module on rank zero, on the host; empty on other ranks.

        To get the whole model in one process, during a run or after it::

            state = trainer.strategy.whole_state_dict()  # on all ranks
            if trainer.is_global_zero:
                model = Model()
                model.load_state_dict(state)

        To be called by all ranks, between batches: from a hook, or after the run. Rank zero needs memory for the whole state.

        Raises:
            ConfigurationError: in the middle of a step, or before there is a module.
        """
        if self.lightning_module is None:
            raise ConfigurationError(
                "whole_state_dict() was called before a run, when the strategy has no module yet. Call it in a hook or after"
                " trainer.fit; before any run the module is whole, and has its state_dict()."
            )
        self._require_no_step("whole_state_dict()")
        state = self.lightning_module.state_dict()
        return state if self._stage_model is None else self._whole_state(state)

    def _require_no_step(self, what: str, otherwise: str = "") -> None:
        if self._stepping and not self._virtual:
            raise ConfigurationError(
                f"{what} was called in the middle of a step, by training_step or the like or by a signal handler,"
                " while other ranks wait for what this one sends. Call it between batches and on all ranks: from"
                f" on_train_batch_end{otherwise}."
            )

    def _whole_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        model = self._running_stage_model
        parts = enumerate(tensors for _, tensors in self._from_stages({}, state))
        merged = {name: tensors[name] for stage, tensors in parts for name in tensors if model.speaks_for(stage, name)}
        return {name: merged[name] for name in stage_files.in_order(merged, model.state_names)}

    def _whole_again(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Gather from all stages the state that a hook has put in place of the module's; a collective.

        Callbacks that save averaged or pruned weights instead make them from the module, of which a process has one stage. A hook
        that only drops some gathered entries needs no gathering: it has all entries on rank zero.
        """
        if not self.reduce_boolean_decision(state is not self._gathered, all=False):
            return dict(state)
        merged = {**state, **self._whole_state(state)}
        return {name: merged[name] for name in stage_files.in_order(merged, self._running_stage_model.state_names)}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The unsplit module's optimizer state on rank zero, empty elsewhere; a collective. If sharded, this stage's part."""
        if self._by_hand:
            return super().optimizer_state(optimizer)
        plain, tensors = self._whole_stage(*stage_files.optimizer_part(optimizer, self._parameter_names()))
        if self._sharded:
            return {"plain": plain, "tensors": tensors}
        parts = self._from_stages(plain, tensors)
        if not parts:
            return {}
        # On a virtual mesh no rank sent the state, so its form is not checked; LBFGS keeps lists of tensors.
        believed = parts if self._virtual else self._own(parts)
        state, self._saved_groups = stage_files.merge_optimizer_states(
            believed, _options(optimizer), self._running_stage_model.parameter_names
        )
        return state

    def _whole_stage(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> stage_files.StageState:
        """The optimizer state of this rank's whole stage, on the rank that saves the stage; a collective."""
        if self.zero_stage == 0:
            return plain, tensors
        stage = self.mesh.worker(self.global_rank).stage
        banned = self.ledger.banned
        ranks = [rank for rank in self.mesh.stage_ranks(stage) if self.mesh.worker(rank) not in banned]
        with self._at_work():
            parts = stage_files.collect(plain, tensors, ranks, to=stage_files.speakers(self.mesh, banned)[stage])
        return stage_files.join_optimizer_parts(parts) if parts else (plain, {})

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._sharded and (storage_options is not None or local_path(filepath) is None):
            raise ConfigurationError(
                f"A sharded checkpoint is a directory on a disk that all machines share, and {str(filepath)!r} is none. Save to"
                " such a path, or use SentinelStrategy(state_dict_type='full')."
            )
        if self._stage_model is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        # A copy, because hooks may keep the dict that they were given.
        checkpoint = dict(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint[SECTION] = {
                "step": self.step,
                "mesh": [self.mesh.stages, self.mesh.replicas],
                "ledger": self.ledger.state_dict(),
                "verifiers": self._learned(),
                "tolerances": {} if self._guard is None else self._guard.tolerances.state_dict(),
                "optimizer_groups": self._saved_groups,
                "seed": self._seed,
                "processes": self.world_size,
                "generators": self._generators(),
                "settings": self._settings.plain,
            }
        if self._sharded:
            self._save_parts(checkpoint, filepath)
            return
        checkpoint["state_dict"] = self._whole_again(checkpoint["state_dict"])
        self._gathered = None
        failure: Exception | None = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except Exception as error:
            failure = error
        self._agree_that_saved(filepath, failure)

    def _learned(self) -> dict[str, Any]:
        parts = self._from_stages({}, self._guard.state_dict() if self._guard is not None else {})
        own: list[dict[str, Any]] = [{} for _ in parts]
        for stage, (_, tensors) in enumerate(parts):
            prefixes = tuple(f"{boundary.name}/" for boundary in self.mesh.boundaries if boundary.receiver != stage)
            own[stage] = {name: value for name, value in tensors.items() if self._virtual or not name.startswith(prefixes)}
        return {name: value for tensors in own for name, value in tensors.items()}

    def _generators(self) -> dict[int, dict[str, Any]]:
        """The generator states of all ranks that are not banned, on rank zero."""
        assert self._randomness is not None and self.lightning_module is not None
        states = self._position.states(self.lightning_module.trainer, self._randomness, self.root_device)
        ranks = [r for r in range(self.world_size) if self._virtual or self.mesh.worker(r) not in self.ledger.banned]
        with self._at_work():
            parts = stage_files.collect({}, states, ranks, _MOST_BYTES_OF_GENERATORS)
        return {rank: tensors for rank, (_, tensors) in zip(ranks, parts)}

    def _save_parts(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        """Each stage writes its part; then rank zero writes the index that makes the parts a checkpoint."""
        target = Path(str(local_path(filepath)))
        failure: Exception | None = None
        destination: Destination | None = None
        if self.is_global_zero:
            try:
                destination = Destination.prepare(target)
            except Exception as error:
                failure = error
        with self._at_work():
            prepared = self.broadcast([] if destination is None else list(destination))
        if not prepared:
            self._agree_that_saved(filepath, failure)
        destination = Destination(*prepared)
        states = {key: checkpoint.pop(key) for key in ("state_dict", averaging.CURRENT) if key in checkpoint}
        optimizers = checkpoint.pop("optimizer_states", [])
        described: dict[str, Any] = {}
        speaking = stage_files.speakers(self.mesh, self.ledger.banned)
        if self._virtual or self.global_rank in speaking:
            try:
                stage = 0 if self._virtual else self.mesh.worker(self.global_rank).stage
                parts = [(one["plain"], one["tensors"]) for one in optimizers]
                described = destination.write_part(stage, states, parts)
            except Exception as error:
                failure = error
                described = {"failure": f"{type(error).__name__}: {error}"}
        with self._at_work():
            written = [plain for plain, _ in stage_files.collect(described, {}, speaking)]
        if self.is_global_zero:
            lost = next((rank for rank, part in zip(speaking, written) if "failure" in part), None)
            try:
                if lost is None:
                    speaks_for = self._running_stage_model.speaks_for
                    believed = [destination.believed(stage, part, partial(speaks_for, stage)) for stage, part in enumerate(written)]
                    names = [name for part in believed for name in part["state_names"]]
                    destination.publish(checkpoint, believed, self._index(names, len(optimizers)))
                else:
                    failure = failure or self._not_saved(lost, filepath, written[speaking.index(lost)]["failure"])
                    destination.abandon()
            except Exception as error:
                failure = error
                destination.abandon()
        self._agree_that_saved(filepath, failure)

    def _index(self, names: Collection[str], optimizers: int) -> dict[str, Any]:
        model = self._running_stage_model
        return {
            "state_names": stage_files.in_order(names, model.state_names),
            "parameter_names": list(model.parameter_names),
            "options": [_options(optimizer) for optimizer in self.optimizers[:optimizers]],
        }

    def _agree_that_saved(self, filepath: Any, failure: Exception | None) -> None:
        """Raise on all ranks if rank zero could not save, so that no rank goes on and waits for ranks that have ended."""
        with self._at_work():
            reason = self.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if reason is not None:
            raise self._not_saved(0, filepath, reason)

    def _not_saved(self, rank: int, filepath: Any, reason: str) -> WorkerLostError:
        return WorkerLostError(
            f"The run cannot go on: rank {rank}, {self.mesh.worker(rank)}, could not save the checkpoint {filepath}: {reason}."
            " Start it again from an earlier checkpoint once the cause is gone.",
            rank=rank,
        )

    # -------------------------------------------------------------------------------------------------------------- loading

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.training:
            self._position.begin()
        return dataloader

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, or this stage's part of a sharded one; with ``weights_only=True`` unless Lightning says otherwise.

        The section that this strategy has added is put aside, so that no hook sees it.
        """
        checkpoint = self._read_checkpoint(checkpoint_path, weights_only)
        self._section = checkpoint.pop(SECTION, {})
        return checkpoint

    def _read_checkpoint(self, checkpoint_path: Any, weights_only: bool | None) -> dict[str, Any]:
        path = local_path(checkpoint_path)
        self._saved_names = None
        weights_only = True if weights_only is None else weights_only
        if self._roster is not None:
            # Weights are loaded into stages, and Lightning restores callbacks' states before the run starts.
            with self._watching():
                self._take_stage()
        if path is None or not path.is_dir():
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
            require_checkpoint(checkpoint, checkpoint_path)
            if averaging.CURRENT in checkpoint:
                assert self.lightning_module is not None
                self._saved_names = averaging.of_stage(checkpoint, set(self.lightning_module.state_dict()))
            return checkpoint
        assert self.lightning_module is not None
        saved = ShardedCheckpoint(path, weights_only)
        checkpoint = saved.checkpoint
        self._saved_names = saved.state_names
        checkpoint |= saved.states(set(self.lightning_module.state_dict()))
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING and saved.has_optimizer:
            names = frozenset(self._parameter_names().values())
            checkpoint["optimizer_states"], groups = saved.optimizer_states(names)
            checkpoint[SECTION]["optimizer_groups"] = groups
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        model = self._running_stage_model
        assert module is not None
        refuse_resumed_finetuning(module.trainer, self.mesh)
        own = stage_files.select_state(checkpoint["state_dict"], module, model.state_names, strict, self._saved_names)
        module.load_state_dict(own, strict=strict)


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group: all entries but its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
