"""Builds the module without memory, until the stage of this process is known, then cuts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.partition import StageModel, cut
from lightning_sentinel.strategy.averaging import copy_again
from lightning_sentinel.strategy.processes import Processes
from lightning_sentinel.strategy.settings import StrategySettings
from lightning_sentinel.strategy.whole_summary import show_whole_module

__all__ = ["StageBuilder"]


class StageBuilder:
    """Lets ``configure_model`` build the whole module without memory; then this process allocates its own stage.

    Args:
        settings: the strategy's settings.
        processes: the processes of the run.
    """

    def __init__(self, settings: StrategySettings, processes: Processes) -> None:
        self._settings = settings
        self._processes = processes
        self._build: DeferredBuild | None = None
        """The build by ``configure_model``, whose tensors have no values yet."""
        self._model: StageModel | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        """The parameters of this stage, by name, when the module was cut: pruning renames parameters later."""

    @property
    def is_cut(self) -> bool:
        """Whether the module was cut in this run."""
        return self._model is not None

    @property
    def is_building(self) -> bool:
        """Whether the module has tensors without values."""
        return self._build is not None

    @property
    def model(self) -> StageModel:
        """The module, cut into stages."""
        assert self._model is not None, "the module is cut in setup"
        return self._model

    def forget(self) -> None:
        """Begin a run, whose module is yet to be cut."""
        self._model = None

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """A context for ``configure_model``, in which a tensor gets its values when the module is cut.

        On a virtual mesh it gets them at once, because all stages are in this process.
        """
        self._build = DeferredBuild()
        with nullcontext() if self._settings.virtual else self._build:
            yield

    def take(self, trainer: L.Trainer, module: L.LightningModule, place: Callable[[], None]) -> StageModel:
        """Cut the module and bring this process's stage to its device, unless that was done in this run.

        Args:
            trainer: the Trainer of the run.
            module: the user's module.
            place: converts the cut module to the run's precision, and moves it to its device.
        """
        if self._model is not None:
            return self._model
        virtual = self._settings.virtual
        if not virtual:
            show_whole_module(trainer, module)
        self._model = self._cut(module)
        place()
        self.parameters = dict(module.named_parameters())
        if trainer.state.fn == TrainerFn.FITTING and not virtual:
            copy_again(trainer, module)
        return self._model

    def _cut(self, module: L.LightningModule) -> StageModel:
        settings = self._settings
        processes = self._processes
        model = cut(
            module,
            processes.mesh,
            settings.partition,
            settings.sequential,
            settings.activation_checkpointing,
            None if settings.virtual else processes.worker,
            processes.device,
            self._build,
        )
        self._build = None  # it holds the tensors and operations of the whole build
        return model

    @contextmanager
    def whole(self, optimizers: Callable[[], Sequence[Optimizer]]) -> Iterator[None]:
        """A context for ``configure_optimizers``, which needs the whole module; then optimizers keep this stage's parameters.

        Args:
            optimizers: returns the optimizers that were made.
        """
        skeleton = None if self._model is None else self._model.skeleton
        if skeleton is None:
            yield
            return
        with skeleton.put_back():
            yield
        for optimizer in optimizers():
            skeleton.leave(optimizer)

    def parameter_names(self) -> dict[int, str]:
        """The name of each parameter of this stage in the whole module, by ``id``."""
        first_name = self.model.first_name
        return {id(parameter): first_name(name) for name, parameter in self.parameters.items()}
