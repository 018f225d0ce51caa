"""Resumes a run from a checkpoint: its optimizer, its position in the data, what verifiers have learned, and bans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints import full as stage_files
from lightning_sentinel.pipeline.checkpoints.resumption import own_generators
from lightning_sentinel.pipeline.messages.tensor_trees import broadcast_tree
from lightning_sentinel.pipeline.processes.wire import is_connected
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.building import StageBuilder
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.strategy.settings import differences

__all__ = ["Resumption", "believed_parts"]


def believed_parts(run: RunState, stage: StageBuilder, parts: Sequence[stage_files.StageState]) -> list[stage_files.StageState]:
    """The optimizer part of each stage, restricted to the parameters that the stage saves."""
    model = stage.model
    stages = range(run.mesh.stages)
    speaking = run.speakers
    own = [{name for name in model.parameter_names if model.speaks_for(stage, name)} for stage in stages]
    return [stage_files.own_part(part, names, rank) for part, names, rank in zip(parts, own, speaking)]


class Resumption:
    """Resumes a run where a checkpoint left it.

    Args:
        run: the state of the run.
        stage: the stage of this process.
        bans: takes over bans.
    """

    def __init__(self, run: RunState, stage: StageBuilder, bans: BanKeeper) -> None:
        self._run = run
        self._stage = stage
        self._bans = bans
        self._return_to: dict[str, Any] | None = None
        """Generator states for the position in the data of a resumed run, empty if unknown; ``None`` once the run has begun."""

    def expect(self) -> None:
        """Say that the run will be resumed: its loaders, which may be asked for before that, stay unopened until then."""
        self._return_to = {}

    @property
    def is_pending(self) -> bool:
        """Whether the run's position in the data is yet to be restored."""
        return self._return_to is not None

    def return_to_position(self, trainer: L.Trainer) -> None:
        """Move the run to its position in the data, if it is a resumed one that has not begun."""
        if self._return_to is not None:
            self._run.position.return_to(trainer, self._return_to or None)
            self._return_to = None

    def restore_run(self, section: Mapping[str, Any], trainer: L.Trainer) -> None:
        """Restore the position in the data, and what the verifiers and the ledger had learned.

        Args:
            section: what this strategy had added to the checkpoint; empty in the checkpoint of a run without it.
            trainer: the Trainer of the run.
        """
        run = self._run
        self.expect()
        if not section:
            # Such a run's steps are Lightning's batches, and nothing else is known.
            run.step = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            return
        run.step = section["step"]
        written_on = Mesh(*section.get("mesh", (run.mesh.stages, run.mesh.replicas)))
        self._restore_randomness(section, written_on)
        told = self._bans.resume(section["ledger"], written_on, run.step)
        self._tell_of_settings(section.get("settings", {}))
        if run.guard is not None and written_on.stages != run.mesh.stages:
            told.append("Verifiers start afresh: until their warm-up is over nobody is flagged.")
        if told or written_on != run.mesh:
            then = f"The checkpoint was written on {written_on.stages} stages x {written_on.replicas} replicas."
            rank_zero_warn(" ".join([then, f"This run has {run.mesh.stages} x {run.mesh.replicas}.", *told]))
        # With another number of stages the module is cut at other places, so its boundaries are others.
        if run.guard is not None and written_on.stages == run.mesh.stages:
            run.guard.load_state_dict(section["verifiers"])
            run.guard.tolerances.load_state_dict(section.get("tolerances", {}))

    def restore_optimizers(
        self, section: Mapping[str, Any], checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]
    ) -> None:
        """Load this stage's part of each optimizer's state; a collective.

        Args:
            section: what this strategy had added to the checkpoint.
            checkpoint: the checkpoint, without that section.
            optimizers: the optimizers of this stage.
        """
        run = self._run
        # Lightning's checkpoint connector may be asked to restore a checkpoint where there is no run.
        others = frozenset() if run.engine is None else run.engine.gradients.stepped_by_others(run.ledger.banned)
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"]):
            groups = section["optimizer_groups"] if section else self._named_groups(saved, optimizer)
            own = stage_files.own_optimizer_state(saved, groups, optimizer, self._stage.parameter_names(), others)
            optimizer.load_state_dict(own)

    def _tell_of_settings(self, before: Mapping[str, Any]) -> None:
        """Warn if the run goes on with other settings of verification or response: what was learned, and bans, are kept."""
        now = self._run.settings.plain
        changed = [
            f"{name.capitalize()}: {', '.join(changes)}."
            for name in ("verification", "response")
            if name in before and (changes := differences(before[name], now[name]))
        ]
        if changed:
            banned = ", ".join(map(str, sorted(self._run.ledger.banned))) or "nobody"
            rank_zero_warn(
                f"The run goes on with other settings than the checkpoint was written with. {' '.join(changed)} What the verifiers"
                f" had learned is taken over where it fits, and so are bans: banned now: {banned}. Pass the settings from before to"
                " go on as before."
            )

    def _restore_randomness(self, section: Mapping[str, Any], written_on: Mesh) -> None:
        if "seed" not in section:
            return
        run = self._run
        processes = run.processes
        run.seed = section["seed"]
        saved = section["generators"]
        states = own_generators(saved, written_on, section["processes"], run.mesh, processes.rank, processes.world_size)
        if states is None:
            return
        computation = {name.split("/", 1)[1]: state for name, state in states.items() if name.startswith("computation/")}
        if computation and run.randomness is not None:
            run.randomness.load_states(computation, processes.device)
        self._return_to = states

    def _named_groups(self, saved: Mapping[str, Any], optimizer: Optimizer) -> list[list[str]]:
        """The parameter names behind the numbers in the optimizer state of an unsplit module; a collective."""
        plain, _ = stage_files.optimizer_part(optimizer, self._stage.parameter_names())
        said = self._run.from_stages({"groups": plain["groups"], "numbers": [], "options": plain["options"]}, {})
        parts = [{"groups": part["groups"]} for part, _ in believed_parts(self._run, self._stage, said)]
        if is_connected():
            with self._run.at_work():
                parts = broadcast_tree(parts, 0)
        return stage_files.group_names(saved, parts, self._stage.model.parameter_names)
