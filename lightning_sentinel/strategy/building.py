"""The part of the strategy that builds a module: without memory, until it is known which stage is this process's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from typing_extensions import override

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.partition import StageModel, cut
from lightning_sentinel.strategy.processes import ProcessStrategy

__all__ = ["StageBuilding"]

_NOTHING = "sentinel_nothing_to_train"


class StageBuilding(ProcessStrategy):
    """Lets ``configure_model`` describe the whole module, of which a process gets its own stage."""

    _partition: str
    _sequential: str | None
    _activation_checkpointing: bool
    _build: DeferredBuild | None = None

    @property
    @abstractmethod
    def mesh(self) -> Mesh:
        """Who serves what."""

    @property
    @abstractmethod
    def worker(self) -> Worker:
        """The worker that this process is."""

    @override
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """What is built inside gets its values when it is cut; on a virtual mesh, of which all stages are here, at once."""
        self._build = DeferredBuild()
        with nullcontext() if self._virtual else self._build:
            yield

    def _cut(self) -> StageModel:
        """Cut the module and keep this process's stage."""
        assert self.lightning_module is not None
        model = cut(
            self.lightning_module,
            self.mesh,
            self._partition,
            self._sequential,
            self._activation_checkpointing,
            None if self._virtual else self.worker,
            self.root_device,
            self._build,
        )
        self._build = None  # it holds what was built from
        return model

    @override
    def teardown(self) -> None:
        if self._build is not None:
            # The run has failed before the module was cut, and what has no values cannot be moved to the host.
            self._lightning_module = None
        super().teardown()

    @contextmanager
    def _something_to_optimize(self) -> Iterator[None]:
        """Around ``setup_optimizers``: a stage that trains nothing has an optimizer too, which torch refuses to make of nothing."""
        module = self.lightning_module
        assert module is not None
        if any(parameter.requires_grad for parameter in module.parameters()):
            yield
            return
        nothing = nn.Parameter(torch.zeros(()))
        module.register_parameter(_NOTHING, nothing)
        try:
            yield
        finally:
            delattr(module, _NOTHING)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["params"] = [parameter for parameter in group["params"] if parameter is not nothing]
            if "param_names" in group:
                group["param_names"] = [name for name in group["param_names"] if name != _NOTHING]
