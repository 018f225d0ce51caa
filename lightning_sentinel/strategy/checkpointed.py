"""The part of the strategy that answers Lightning's hooks for building, saving and loading the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.pipeline.checkpoints.files import AtomicCheckpointIO
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.building import StageBuilder
from lightning_sentinel.strategy.checkpoints import CheckpointWriter
from lightning_sentinel.strategy.loading import CheckpointReader
from lightning_sentinel.strategy.ranks import RankedStrategy
from lightning_sentinel.strategy.resuming import Resumption
from lightning_sentinel.strategy.run_state import RunState

__all__ = ["CheckpointedStrategy"]


class CheckpointedStrategy(RankedStrategy):
    """A strategy whose module is cut into stages, saved whole or in parts, and loaded into stages again.

    Args:
        run: the state of the run.
        bans: takes over bans of a resumed run.
        arguments: the arguments of ``ParallelStrategy``.
    """

    def __init__(self, run: RunState, bans: BanKeeper, **arguments: Any) -> None:
        super().__init__(run, bans, **arguments)
        self._stage = StageBuilder(run.settings, run.processes)
        self._checkpoints = CheckpointWriter(run, self._stage)
        self._reader = CheckpointReader(self._stage)
        self._resumption = Resumption(run, self._stage, bans)

    @property
    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None, "the Trainer connects the module before a run"
        return self.lightning_module

    @property
    def _trainer(self) -> L.Trainer:
        return self._module.trainer

    @property
    def _by_hand(self) -> bool:
        """Whether steps run as in plain Lightning, because the module steps its optimizers itself and there is no pipeline."""
        return self._run.has_all_stages and not self._module.automatic_optimization

    # ---------------------------------------------------------------------------------------------------------- the module

    @override
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lightning's context for ``configure_model``: tensors get no values before the module is cut."""
        with self._stage.deferring():
            yield

    def _take_stage(self) -> StageModel:
        module = self._module
        assert self.accelerator is not None
        if not self._stage.is_cut:
            self.accelerator.setup(self._trainer)
        return self._stage.take(self._trainer, module, self._place_stage)

    def _place_stage(self) -> None:
        self.model = self.precision_plugin.convert_module(self._module)
        self.model_to_device()

    # --------------------------------------------------------------------------------------------------------------- saving

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
        return self._checkpoints.whole_state(self.lightning_module)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Lightning's hook for the weights of a checkpoint."""
        return self._checkpoints.module_state(self._module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Lightning's hook for the optimizer's state in a checkpoint."""
        return super().optimizer_state(optimizer) if self._by_hand else self._checkpoints.optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Lightning's hook for a checkpoint that is to be written."""

        def write(whole: dict[str, Any]) -> None:
            ParallelStrategy.save_checkpoint(self, whole, filepath, storage_options)

        self._checkpoints.save(checkpoint, filepath, self.lightning_module, write, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's hook for a checkpoint that is to be read; ``weights_only`` unless Lightning says otherwise."""
        weights_only = True if weights_only is None else weights_only
        if self._processes.has_met:
            # Weights are loaded into stages, and Lightning restores callbacks' states before the run starts.
            with self._processes.watching():
                self._take_stage()
            if self._run.engine is None and self._trainer.state.fn == TrainerFn.FITTING:
                self._resumption.expect()

        def read_file() -> dict[str, Any]:
            return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

        return self._reader.read(checkpoint_path, self.lightning_module, weights_only, read_file)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Lightning's hook for the weights of a loaded checkpoint."""
        self._reader.load_module(checkpoint, self._module, self.mesh, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Lightning's hook for the optimizer's state of a loaded checkpoint, and for what else a resumed run restores."""
        section = self._reader.section
        self._resumption.restore_run(section, self._trainer)
        if self._by_hand:
            super().load_optimizer_state_dict(checkpoint)
        else:
            self._resumption.restore_optimizers(section, checkpoint, self.optimizers)
