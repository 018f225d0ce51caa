"""Parameters that layers of several stages share, such as the embedding and the head of a language model.

Each of these stages has a copy. The copies' gradients are summed over the stages, so that the stages' optimizers take the same step
and the copies stay equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.gradients.groups import StageGroups, first_healthy
from lightning_sentinel.pipeline.gradients.reduction import sum_over_stages
from lightning_sentinel.pipeline.stages.ties import Tie

__all__ = ["TiedStages", "Untied"]


class TiedStages:
    """Keeps the copies of shared parameters on different stages equal.

    Args:
        ties: the shared parameters of the whole module, the same on all ranks.
        module: this rank's part of the module.
        mesh: all workers.
        stage: this rank's stage.
    """

    def __init__(self, ties: Sequence[Tie], module: nn.Module, mesh: Mesh, stage: int) -> None:
        self._mesh = mesh
        self._stage = stage
        by_name = dict(module.named_parameters(remove_duplicate=False))
        self._shared: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for tie in ties:
            found = [by_name[name] for name in tie.names if name in by_name and by_name[name].requires_grad]
            shared = self._shared.setdefault(tie.stages, [])
            if stage in tie.stages:
                shared += found[:1]
        self.sets = tuple(self._shared)
        """Sets of stages that share parameters."""
        self.counted_elsewhere = frozenset(
            id(parameter) for stages, shared in self._shared.items() if stage != stages[0] for parameter in shared
        )
        """Parameters, by ``id``, whose gradient norm an earlier stage counts."""

    def add_up(self, groups: StageGroups, banned: Collection[object]) -> None:
        """Replace shared parameters' gradients by their sums over stages; to be called by all ranks that are not banned."""
        for stages, shared in self._shared.items():
            if self._stage in stages and shared:
                speakers = [first_healthy(self._mesh, stage, banned) for stage in stages]
                sum_over_stages(shared, groups.across(stages), speakers)

    @torch.no_grad()
    def make_equal(self, groups: StageGroups, banned: Collection[object]) -> None:
        """Broadcast the first stage's values to all copies; to be called by all ranks that are not banned."""
        for stages, shared in self._shared.items():
            for parameter in shared if self._stage in stages else ():
                groups.across(stages).broadcast(parameter.data, first_healthy(self._mesh, stages[0], banned))


class Untied:
    """Shared parameters of a mesh in one process: each stage but the first gets a leaf of its own on the same memory.

    Stages may have different clean fractions, so each needs gradients of its own until they are scaled.

    Args:
        layers: the layers of each stage.
    """

    def __init__(self, layers: Sequence[Iterable[nn.Module]]) -> None:
        owners: dict[int, nn.Parameter] = {}
        self.parameters: list[list[nn.Parameter]] = []
        """The leaf parameters of each stage."""
        self.instead: dict[int, dict[str, nn.Parameter]] = {}
        """Parameters to run a layer with in place of its own, by the layer's ``id`` and the parameter's name."""
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        for stage in layers:
            mine: dict[int, nn.Parameter] = {}
            for layer in stage:
                for name, parameter in layer.named_parameters(remove_duplicate=False):
                    if id(parameter) not in mine:
                        mine[id(parameter)] = self._of_stage(parameter, owners)
                    if mine[id(parameter)] is not parameter:
                        self.instead.setdefault(id(layer), {})[name] = mine[id(parameter)]
            self.parameters.append(list(mine.values()))
        self.owners = list(owners.values())
        """All parameters of the module, each once."""

    def _of_stage(self, parameter: nn.Parameter, owners: dict[int, nn.Parameter]) -> nn.Parameter:
        if id(parameter) not in owners:
            owners[id(parameter)] = parameter
            return parameter
        copy = nn.Parameter(parameter.detach(), parameter.requires_grad)
        self._copies.append((parameter, copy))
        return copy

    def add_up(self) -> None:
        """Add the copies' gradients to those of the parameters that they copy."""
        for owner, copy in self._copies:
            if copy.grad is not None:
                owner.grad = copy.grad if owner.grad is None else owner.grad + copy.grad
                copy.grad = None

    def call(self, layer: nn.Module, signal: Tensor) -> Tensor:
        """Run a layer with the parameters of its stage."""
        instead: Mapping[str, Tensor] = self.instead.get(id(layer), {})
        return torch.func.functional_call(layer, dict(instead), (signal,)) if instead else layer(signal)
