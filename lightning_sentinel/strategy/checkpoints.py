"""The part of the strategy that is about checkpoints: what a run has learned, to a file or to parts, and back into stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError, WorkerLostError
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints import full as stage_files
from lightning_sentinel.pipeline.checkpoints.files import AtomicCheckpointIO, local_path, require_checkpoint
from lightning_sentinel.pipeline.checkpoints.full import SECTION
from lightning_sentinel.pipeline.checkpoints.resumption import DataPosition, own_generators
from lightning_sentinel.pipeline.checkpoints.sharded import Destination, ShardedCheckpoint
from lightning_sentinel.pipeline.face import Engine
from lightning_sentinel.pipeline.messages.parcels import broadcast_parcel
from lightning_sentinel.pipeline.randomness import SeparateRandomness
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.strategy import averaging
from lightning_sentinel.strategy.bans import LastingBans
from lightning_sentinel.strategy.support import refuse_resumed_finetuning

__all__ = ["StageCheckpoints"]

_MOST_BYTES_OF_GENERATORS = 2**20


class StageCheckpoints(LastingBans):
    """Saves and loads a module that is cut into stages."""

    _guard: Guard | None
    _engine: Engine | None
    _stage_model: StageModel | None
    _randomness: SeparateRandomness | None
    _saved_groups: list[list[str]]
    _sharded: bool
    _zero_stage: int
    _saved_names: list[str] | None
    """Keys of the module in the checkpoint of which this stage's part was read; ``None`` if all of it was."""
    _position: DataPosition
    _seed: int
    _return_to: dict[str, Any] | None
    """Where in its data a resumed run has to go on, before it has begun."""

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded into stages, so the module must have been cut before."""
        return True

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """The user's plugin, or one that never leaves half a file."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif getattr(self._checkpoint_io, "checkpoint_io", self) is None:
            # Lightning's AsyncCheckpointIO, which leaves the writing to another.
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # type: ignore[attr-defined]
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO) -> None:
        self._checkpoint_io = checkpoint_io

    # --------------------------------------------------------------------------------------------------------------- saving

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The unsplit module's state on rank zero, nothing elsewhere; a collective. Sharded, this stage's on each rank."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        if self._sharded:
            return state
        return self._whole_state(state)

    def _whole_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        model = self._running_stage_model
        parts = enumerate(tensors for _, tensors in self._from_stages({}, state))
        merged = {name: tensors[name] for stage, tensors in parts for name in tensors if model.speaks_for(stage, name)}
        return {name: merged[name] for name in model.state_names if name in merged}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The unsplit module's optimizer state on rank zero, nothing elsewhere; a collective. Sharded, this stage's part."""
        plain, tensors = self._whole_stage(*stage_files.optimizer_part(optimizer, self._parameter_names()))
        if self._sharded:
            return {"plain": plain, "tensors": tensors}
        parts = self._from_stages(plain, tensors)
        if not parts:
            return {}
        state, self._saved_groups = stage_files.merge_optimizer_states(
            self._own(parts), _options(optimizer), self._running_stage_model.parameter_names
        )
        return state

    def _own(self, parts: Sequence[stage_files.Part]) -> list[stage_files.Part]:
        """Of what each stage says of its optimizer what is for it to say."""
        model = self._running_stage_model
        speaking = stage_files.speakers(self.mesh, self.ledger.banned)
        own = [{name for name in model.parameter_names if model.speaks_for(stage, name)} for stage in range(self.mesh.stages)]
        return [stage_files.own_part(part, names, rank) for part, names, rank in zip(parts, own, speaking)]

    def _whole_stage(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> stage_files.Part:
        """The optimizer state of the whole stage, on the rank that speaks for it; a collective."""
        if self._zero_stage == 0:
            return plain, tensors
        stage, banned = self.mesh.worker(self.global_rank).stage, self.ledger.banned
        ranks = [rank for rank in self.mesh.stage_ranks(stage) if self.mesh.worker(rank) not in banned]
        with self._at_work():
            parts = stage_files.collect(plain, tensors, ranks, to=stage_files.speakers(self.mesh, banned)[stage])
        return stage_files.join_optimizer_parts(parts) if parts else (plain, {})

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
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
            }
        if self._sharded:
            self._save_parts(checkpoint, filepath, storage_options)
            return
        if averaging.CURRENT in checkpoint:
            checkpoint["state_dict"] = self._whole_state(checkpoint["state_dict"])
        failure: Exception | None = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except Exception as error:
            failure = error
        self._agree_that_saved(filepath, failure)

    def _from_stages(self, plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[stage_files.Part]:
        with self._at_work():
            return stage_files.collect(plain, tensors, stage_files.speakers(self.mesh, self.ledger.banned))

    def _learned(self) -> dict[str, Any]:
        parts = self._from_stages({}, self._guard.state_dict() if self._guard is not None else {})
        own: list[dict[str, Any]] = [{} for _ in parts]
        for stage, (_, tensors) in enumerate(parts):
            prefixes = tuple(f"{boundary.name}/" for boundary in self.mesh.boundaries if boundary.receiver != stage)
            own[stage] = {name: value for name, value in tensors.items() if self._virtual or not name.startswith(prefixes)}
        return {name: value for tensors in own for name, value in tensors.items()}

    def _generators(self) -> dict[int, dict[str, Any]]:
        """Of all ranks that are not banned, on rank zero."""
        assert self._randomness is not None and self.lightning_module is not None
        states = self._position.states(self.lightning_module.trainer, self._randomness, self.root_device)
        ranks = [r for r in range(self.world_size) if self._virtual or self.mesh.worker(r) not in self.ledger.banned]
        with self._at_work():
            parts = stage_files.collect({}, states, ranks, _MOST_BYTES_OF_GENERATORS)
        return {rank: tensors for rank, (_, tensors) in zip(ranks, parts)}

    def _save_parts(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None) -> None:
        """Each stage writes its part, and rank zero what makes them a checkpoint."""
        target = local_path(filepath)
        if target is None or storage_options is not None:
            raise ConfigurationError(
                f"A sharded checkpoint is a directory on a disk that all machines share, and {str(filepath)!r} is none. Save to"
                " such a path, or use SentinelStrategy(state_dict_type='full')."
            )
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
                failure, described = error, {"failure": f"{type(error).__name__}: {error}"}
        with self._at_work():
            written = [plain for plain, _ in stage_files.collect(described, {}, speaking)]
        if self.is_global_zero:
            lost = next((rank for rank, part in zip(speaking, written) if "failure" in part), None)
            try:
                if lost is None:
                    speaks_for = self._running_stage_model.speaks_for
                    believed = [destination.believed(stage, part, partial(speaks_for, stage)) for stage, part in enumerate(written)]
                    destination.publish(checkpoint, believed, self._index(len(optimizers)))
                else:
                    failure = failure or self._not_saved(lost, filepath, written[speaking.index(lost)]["failure"])
                    destination.abandon()
            except Exception as error:
                failure = error
                destination.abandon()
        self._agree_that_saved(filepath, failure)

    def _index(self, optimizers: int) -> dict[str, Any]:
        model = self._running_stage_model
        return {
            "state_names": list(model.state_names),
            "parameter_names": list(model.parameter_names),
            "options": [_options(optimizer) for optimizer in self.optimizers[:optimizers]],
        }

    def _agree_that_saved(self, filepath: Any, failure: Exception | None) -> None:
        """Tell each other how it went: nobody goes on without a checkpoint, to wait for those who ended."""
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
    def on_train_start(self) -> None:
        if self._return_to is not None:
            assert self.lightning_module is not None
            self._position.return_to(self.lightning_module.trainer, self._return_to or None)
            self._return_to = None

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of a sharded one this stage's part; with ``weights_only=True`` unless Lightning says otherwise."""
        path, self._saved_names = local_path(checkpoint_path), None
        if path is None or not path.is_dir():
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only=True if weights_only is None else weights_only)
            require_checkpoint(checkpoint, checkpoint_path)
            if averaging.CURRENT in checkpoint:
                assert self.lightning_module is not None
                self._saved_names = averaging.of_stage(checkpoint, set(self.lightning_module.state_dict()))
            return checkpoint
        assert self.lightning_module is not None
        saved = ShardedCheckpoint(path)
        checkpoint, self._saved_names = saved.checkpoint, saved.state_names
        checkpoint |= saved.states(set(self.lightning_module.state_dict()))
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING and saved.has_optimizer:
            names = frozenset(self._parameter_names().values())
            checkpoint["optimizer_states"], groups = saved.optimizer_states(names)
            checkpoint[SECTION]["optimizer_groups"] = groups
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module, model = self.lightning_module, self._running_stage_model
        assert module is not None
        refuse_resumed_finetuning(module.trainer, self.mesh)
        own = stage_files.select_state(checkpoint["state_dict"], module, model.state_names, strict, self._saved_names)
        module.load_state_dict(own, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue a run: the optimizer, the place in the data, and what the verifiers and the ledger had learned."""
        section = checkpoint.get(SECTION, {})
        self._return_to = {}
        if section:
            self._resume_run(section)
        else:
            # Of a run without this strategy: its steps are Lightning's batches, and there is nothing else to know.
            assert self.lightning_module is not None
            self.step = self.lightning_module.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        assert self._engine is not None
        others = self._engine.stepped_by_others
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            groups = section["optimizer_groups"] if section else self._named_groups(saved, optimizer)
            own = stage_files.own_optimizer_state(saved, groups, optimizer, self._parameter_names(), others)
            optimizer.load_state_dict(own)

    def _resume_run(self, section: Mapping[str, Any]) -> None:
        self.step = section["step"]
        written_on = Mesh(*section.get("mesh", (self.mesh.stages, self.mesh.replicas)))
        self._resume_randomness(section, written_on)
        told = self._resume_bans(section["ledger"], written_on)
        if self._guard is not None and written_on.stages != self.mesh.stages:
            told.append("Verifiers start afresh: until their warm-up is over nobody is flagged.")
        if told or written_on != self.mesh:
            then = f"The checkpoint was written on {written_on.stages} stages x {written_on.replicas} replicas."
            rank_zero_warn(" ".join([then, f"This run has {self.mesh.stages} x {self.mesh.replicas}.", *told]))
        # A boundary is another one if the module is cut at another place.
        if self._guard is not None and written_on.stages == self.mesh.stages:
            self._guard.load_state_dict(section["verifiers"])
            self._guard.tolerances.load_state_dict(section.get("tolerances", {}))

    def _resume_randomness(self, section: Mapping[str, Any], written_on: Mesh) -> None:
        if "seed" not in section:
            return
        assert self._engine is not None and self._randomness is not None
        self._seed = section["seed"]
        self._engine.reseed(self._seed)
        saved, processes = section["generators"], section["processes"]
        states = own_generators(saved, written_on, processes, self.mesh, self.global_rank, self.world_size)
        if states is None:
            return
        computation = {name.split("/", 1)[1]: state for name, state in states.items() if name.startswith("computation/")}
        if computation:
            self._randomness.load_states(computation, self.root_device)
        self._return_to = states

    def _named_groups(self, saved: Mapping[str, Any], optimizer: Optimizer) -> list[list[str]]:
        """Names for the numbers in the optimizer state of an unsplit module; a collective."""
        plain, _ = stage_files.optimizer_part(optimizer, self._parameter_names())
        said = self._from_stages({"groups": plain["groups"], "numbers": [], "options": plain["options"]}, {})
        parts = [{"groups": part["groups"]} for part, _ in self._own(said)]
        if dist.is_initialized():
            with self._at_work():
                parts = broadcast_parcel(parts, 0)
        return stage_files.group_names(saved, parts, self._running_stage_model.parameter_names)

    def _parameter_names(self) -> dict[int, str]:
        assert self.lightning_module is not None
        first_name = self._running_stage_model.first_name
        return {id(parameter): first_name(name) for name, parameter in self.lightning_module.named_parameters()}

    @property
    def _running_stage_model(self) -> StageModel:
        assert self._stage_model is not None, "the module is cut in setup"
        return self._stage_model

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Computation draws its own random numbers, and the loss of a peer is reported by name."""
        assert self._randomness is not None
        with self._watching(), self._randomness.of_computation():
            yield


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each parameter group all but its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
