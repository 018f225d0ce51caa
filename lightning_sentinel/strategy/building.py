"""The part of the strategy that builds the module: without memory, until the stage of this process is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.partition import StageModel, cut
from lightning_sentinel.strategy.averaging import copy_again
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.strategy.whole_summary import show_whole_module

__all__ = ["StageBuilding"]


class StageBuilding(RunState):
    """Lets ``configure_model`` build the whole module without memory; then each process allocates its own stage."""

    _build: DeferredBuild | None = None
    """The build by ``configure_model``, whose tensors have no values yet."""

    @override
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lightning's context for ``configure_model``: a tensor gets its values when the module is cut.

        On a virtual mesh it gets them at once, because all stages are in this process.
        """
        self._build = DeferredBuild()
        with nullcontext() if self._virtual else self._build:
            yield

    def _cut(self) -> StageModel:
        """Cut the module and keep this process's stage."""
        assert self.lightning_module is not None
        model = cut(
            self.lightning_module,
            self.mesh,
            self.partition,
            self.sequential,
            self.activation_checkpointing,
            None if self._virtual else self.worker,
            self.root_device,
            self._build,
        )
        self._build = None  # it holds the tensors and operations of the whole build
        return model

    def _take_stage(self) -> StageModel:
        """Cut the module and bring this process's stage to its device, unless that was done in this run."""
        if self._stage_model is not None:
            return self._stage_model
        module = self.lightning_module
        assert self.accelerator is not None and module is not None
        trainer = module.trainer
        self.accelerator.setup(trainer)
        if not self._virtual:
            show_whole_module(trainer, module)
        self._stage_model = self._cut()
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        self._cut_parameters = dict(module.named_parameters())
        if trainer.state.fn == TrainerFn.FITTING and not self._virtual:
            copy_again(trainer, module)
        return self._stage_model

    @override
    def teardown(self) -> None:
        if self._build is not None:
            # The run has failed before the module was cut, and tensors without values cannot be moved to the host.
            self._lightning_module = None
        super().teardown()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A context for ``setup_optimizers``, which needs the whole module; afterwards optimizers keep this stage's parameters."""
        skeleton = None if self._stage_model is None else self._stage_model.skeleton
        if skeleton is None:
            yield
            return
        with skeleton.put_back():
            yield
        for optimizer in self.optimizers:
            skeleton.leave(optimizer)
