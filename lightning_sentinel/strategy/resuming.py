"""The part of the strategy that resumes a run from a checkpoint: optimizer, position in the data, verifiers, and bans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints import full as stage_files
from lightning_sentinel.pipeline.checkpoints.resumption import own_generators
from lightning_sentinel.pipeline.messages.tensor_trees import broadcast_tree
from lightning_sentinel.strategy.by_hand import StepsByHand
from lightning_sentinel.strategy.settings import differences

__all__ = ["ResumedRuns"]


class ResumedRuns(StepsByHand):
    """Resumes a run where a checkpoint left it."""

    _section: Mapping[str, Any] = MappingProxyType({})
    """The section that this strategy had added to the loaded checkpoint."""
    _return_to: dict[str, Any] | None = None
    """Generator states for the position in the data of a resumed run, empty if unknown; ``None`` once the run has begun."""

    @override
    def on_train_start(self) -> None:
        if self._return_to is not None:
            assert self.lightning_module is not None
            self._position.return_to(self.lightning_module.trainer, self._return_to or None)
            self._return_to = None

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore a run: the optimizer, the position in the data, and what the verifiers and the ledger had learned."""
        section = self._section
        self._return_to = {}
        if section:
            self._resume_run(section)
        else:
            # The checkpoint of a run without this strategy: its steps are Lightning's batches, and nothing else is known.
            assert self.lightning_module is not None
            self.step = self.lightning_module.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        # Lightning's checkpoint connector may be asked to restore a checkpoint where there is no run.
        others = frozenset() if self._engine is None else self._engine.stepped_by_others
        if self._by_hand:
            super().load_optimizer_state_dict(checkpoint)
            return
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            groups = section["optimizer_groups"] if section else self._named_groups(saved, optimizer)
            own = stage_files.own_optimizer_state(saved, groups, optimizer, self._parameter_names(), others)
            optimizer.load_state_dict(own)

    def _resume_run(self, section: Mapping[str, Any]) -> None:
        self.step = section["step"]
        written_on = Mesh(*section.get("mesh", (self.mesh.stages, self.mesh.replicas)))
        self._resume_randomness(section, written_on)
        told = self._bans.resume(section["ledger"], written_on, self.step)
        self._tell_of_settings(section.get("settings", {}))
        if self._guard is not None and written_on.stages != self.mesh.stages:
            told.append("Verifiers start afresh: until their warm-up is over nobody is flagged.")
        if told or written_on != self.mesh:
            then = f"The checkpoint was written on {written_on.stages} stages x {written_on.replicas} replicas."
            rank_zero_warn(" ".join([then, f"This run has {self.mesh.stages} x {self.mesh.replicas}.", *told]))
        # With another number of stages the module is cut at other places, so its boundaries are others.
        if self._guard is not None and written_on.stages == self.mesh.stages:
            self._guard.load_state_dict(section["verifiers"])
            self._guard.tolerances.load_state_dict(section.get("tolerances", {}))

    def _tell_of_settings(self, before: Mapping[str, Any]) -> None:
        """Warn if the run goes on with other settings of verification or response: what was learned, and bans, are kept."""
        now = self._settings.plain
        changed = [
            f"{name.capitalize()}: {', '.join(changes)}."
            for name in ("verification", "response")
            if name in before and (changes := differences(before[name], now[name]))
        ]
        if changed:
            banned = ", ".join(map(str, sorted(self.ledger.banned))) or "nobody"
            rank_zero_warn(
                f"The run goes on with other settings than the checkpoint was written with. {' '.join(changed)} What the verifiers"
                f" had learned is taken over where it fits, and so are bans: banned now: {banned}. Pass the settings from before to"
                " go on as before."
            )

    def _resume_randomness(self, section: Mapping[str, Any], written_on: Mesh) -> None:
        if "seed" not in section:
            return
        self._seed = section["seed"]
        if self._planner is not None:
            self._planner.seed = self._seed
        saved = section["generators"]
        processes = section["processes"]
        states = own_generators(saved, written_on, processes, self.mesh, self.global_rank, self.world_size)
        if states is None:
            return
        computation = {name.split("/", 1)[1]: state for name, state in states.items() if name.startswith("computation/")}
        if computation and self._randomness is not None:
            self._randomness.load_states(computation, self.root_device)
        self._return_to = states

    def _named_groups(self, saved: Mapping[str, Any], optimizer: Optimizer) -> list[list[str]]:
        """The parameter names behind the numbers in the optimizer state of an unsplit module; a collective."""
        plain, _ = stage_files.optimizer_part(optimizer, self._parameter_names())
        said = self._from_stages({"groups": plain["groups"], "numbers": [], "options": plain["options"]}, {})
        parts = [{"groups": part["groups"]} for part, _ in self._own(said)]
        if dist.is_initialized():
            with self._at_work():
                parts = broadcast_tree(parts, 0)
        return stage_files.group_names(saved, parts, self._running_stage_model.parameter_names)

    def _parameter_names(self) -> dict[int, str]:
        """The name of each parameter of this stage, by ``id``, from when the module was cut: pruning renames parameters later."""
        first_name = self._running_stage_model.first_name
        return {id(parameter): first_name(name) for name, parameter in self._cut_parameters.items()}

    def _from_stages(self, plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[stage_files.StageState]:
        with self._at_work():
            return stage_files.collect(plain, tensors, stage_files.speakers(self.mesh, self.ledger.banned))

    def _own(self, parts: Sequence[stage_files.StageState]) -> list[stage_files.StageState]:
        """The optimizer part of each stage, restricted to the parameters that the stage saves."""
        model = self._running_stage_model
        speaking = stage_files.speakers(self.mesh, self.ledger.banned)
        own = [{name for name in model.parameter_names if model.speaks_for(stage, name)} for stage in range(self.mesh.stages)]
        return [stage_files.own_part(part, names, rank) for part, names, rank in zip(parts, own, speaking)]
