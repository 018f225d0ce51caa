"""The part of the strategy that is about checkpoints: what a run has learned, to one ordinary file and back into stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError, WorkerLostError
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline import checkpoint as stage_files
from lightning_sentinel.pipeline.banning import LastingBans
from lightning_sentinel.pipeline.checkpoint_io import AtomicCheckpointIO
from lightning_sentinel.pipeline.guard import Guard
from lightning_sentinel.pipeline.partition import StageModel
from lightning_sentinel.pipeline.randomness import SeparateRandomness

__all__ = ["StageCheckpoints"]

_SECTION = "lightning_sentinel"
"""Our section of a checkpoint."""


class StageCheckpoints(LastingBans):
    """Saves and loads a module that is cut into stages."""

    _guard: Guard | None
    _stage_model: StageModel | None
    _randomness: SeparateRandomness | None
    _saved_groups: list[list[str]]

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

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The unsplit module's state on rank zero, nothing elsewhere; a collective."""
        assert self.lightning_module is not None
        model, state = self._running_stage_model, self.lightning_module.state_dict()
        with self._at_work():
            parts = stage_files.collect({}, state, self.mesh, self.ledger.banned)
        merged = {name: value for _, tensors in parts for name, value in tensors.items()}
        return {name: merged[name] for name in model.state_names if name in merged}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The unsplit module's optimizer state on rank zero, nothing elsewhere; a collective."""
        plain, tensors = stage_files.optimizer_part(optimizer, self._parameter_names())
        with self._at_work():
            parts = stage_files.collect(plain, tensors, self.mesh, self.ledger.banned)
        if not parts:
            return {}
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        state, self._saved_groups = stage_files.merge_optimizer_states(parts, options, self._running_stage_model.parameter_names)
        return state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if "optimizer_states" in checkpoint:
            with self._at_work():
                state = self._guard.state_dict() if self._guard is not None else {}
                parts = stage_files.collect({}, state, self.mesh, self.ledger.banned)
            checkpoint[_SECTION] = {
                "step": self.step,
                "mesh": [self.mesh.stages, self.mesh.replicas],
                "ledger": self.ledger.state_dict(),
                "verifiers": {name: value for _, tensors in parts for name, value in tensors.items()},
                "optimizer_groups": self._saved_groups,
            }
        self._write(checkpoint, filepath, storage_options)

    def _write(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None) -> None:
        """Rank zero writes, and tells the others how it went: they would wait for it at the next collective."""
        failure: Exception | None = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except Exception as error:
            failure = error
        with self._at_work():
            reason = self.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if reason is not None:
            raise WorkerLostError(
                f"The run cannot go on: rank 0, {self.mesh.worker(0)}, could not save the checkpoint {filepath}: {reason}. Start it"
                " again from an earlier checkpoint once the cause is gone.",
                rank=0,
            )

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module, model = self.lightning_module, self._running_stage_model
        assert module is not None
        own = stage_files.select_state(checkpoint["state_dict"], module, model.state_names, strict)
        module.load_state_dict(own, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue a run: the optimizer, and what the verifiers and the ledger had learned."""
        section = checkpoint.get(_SECTION)
        if section is None:
            raise ConfigurationError(
                "The checkpoint was not written by SentinelStrategy, so the state of its optimizer cannot be dealt to stages. Load"
                " its weights with load_from_checkpoint and start a new run from them."
            )
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.load_state_dict(
                stage_files.own_optimizer_state(saved, section["optimizer_groups"], optimizer, self._parameter_names())
            )
        self.step = section["step"]
        written_on = Mesh(*section.get("mesh", (self.mesh.stages, self.mesh.replicas)))
        told = self._resume_bans(section["ledger"], written_on)
        if self._guard is not None and written_on.stages != self.mesh.stages:
            told.append("Verifiers start afresh: until their warm-up is over nobody is flagged.")
        if told or written_on != self.mesh:
            then = f"The checkpoint was written on {written_on.stages} stages x {written_on.replicas} replicas."
            rank_zero_warn(" ".join([then, f"This run has {self.mesh.stages} x {self.mesh.replicas}.", *told]))
        # A boundary is another one if the module is cut at another place.
        if self._guard is not None and written_on.stages == self.mesh.stages:
            self._guard.load_state_dict(section["verifiers"])

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
