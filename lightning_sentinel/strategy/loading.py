"""Loads a checkpoint into the stages: a file of a whole module, or this stage's part of a sharded checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints import full as stage_files
from lightning_sentinel.pipeline.checkpoints.files import local_path, require_checkpoint
from lightning_sentinel.pipeline.checkpoints.full import SECTION
from lightning_sentinel.pipeline.checkpoints.sharded import ShardedCheckpoint
from lightning_sentinel.strategy import averaging
from lightning_sentinel.strategy.building import StageBuilder
from lightning_sentinel.strategy.refusals import refuse_resumed_finetuning

__all__ = ["CheckpointReader"]


class CheckpointReader:
    """Reads checkpoints for one stage.

    Args:
        stage: the stage of this process.
    """

    def __init__(self, stage: StageBuilder) -> None:
        self._stage = stage
        self._saved_names: list[str] | None = None
        """All keys of the module in the loaded checkpoint, if only this stage's were read; ``None`` if all were."""
        self.section: Mapping[str, Any] = {}
        """The section that this strategy had added to the loaded checkpoint; empty if there was none."""

    def read(
        self, path: Any, module: L.LightningModule | None, weights_only: bool, read_file: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Read a checkpoint, and put aside the section that this strategy has added, so that no hook sees it.

        Args:
            path: the file or directory.
            module: the user's module, cut into stages if there is a run.
            weights_only: whether objects that could run code on loading are refused.
            read_file: reads a file with Lightning's plugin.
        """
        checkpoint = self._read(path, module, weights_only, read_file)
        self.section = checkpoint.pop(SECTION, {})
        return checkpoint

    def _read(
        self, path: Any, module: L.LightningModule | None, weights_only: bool, read_file: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        folder = local_path(path)
        self._saved_names = None
        if folder is None or not folder.is_dir():
            checkpoint = read_file()
            require_checkpoint(checkpoint, path)
            if averaging.CURRENT in checkpoint:
                assert module is not None
                self._saved_names = averaging.of_stage(checkpoint, set(module.state_dict()))
            return checkpoint
        assert module is not None
        saved = ShardedCheckpoint(folder, weights_only)
        checkpoint = saved.checkpoint
        self._saved_names = saved.state_names
        checkpoint |= saved.states(set(module.state_dict()))
        if module.trainer.state.fn == TrainerFn.FITTING and saved.has_optimizer:
            names = frozenset(self._stage.parameter_names().values())
            checkpoint["optimizer_states"], groups = saved.optimizer_states(names)
            checkpoint[SECTION]["optimizer_groups"] = groups
        return checkpoint

    def load_module(self, checkpoint: Mapping[str, Any], module: L.LightningModule, mesh: Mesh, strict: bool) -> None:
        """Load the module's state into the stage of this process.

        Args:
            checkpoint: a checkpoint from :meth:`read`, as hooks have left it.
            module: the user's module.
            mesh: all workers.
            strict: whether the keys must be those of the module.
        """
        refuse_resumed_finetuning(module.trainer, mesh)
        names = self._stage.model.state_names
        own = stage_files.select_state(checkpoint["state_dict"], module, names, strict, self._saved_names)
        module.load_state_dict(own, strict=strict)
