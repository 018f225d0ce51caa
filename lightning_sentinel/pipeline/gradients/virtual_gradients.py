"""The gradients of all stages of a virtual mesh, from the backward passes to the optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractions
from lightning_sentinel.pipeline.gradients.stash import GradientStash, scale_gradients
from lightning_sentinel.pipeline.gradients.ties import Untied

__all__ = ["VirtualGradients"]


class VirtualGradients:
    """The gradients of all stages, summed over replicas; see :class:`Gradients` for each method.

    Args:
        untied: the parameters of each stage.
        replicas: number of replicas, which share the parameters.
        optimizer: the user's optimizer; ``None`` for evaluation.
    """

    def __init__(self, untied: Untied, replicas: int, optimizer: Optimizer | None) -> None:
        self.left_out: frozenset[Worker] = frozenset()
        self._untied = untied
        self._replicas = replicas
        self._optimizer = optimizer
        self._parameters = [parameter for stage in untied.parameters for parameter in stage]
        self._stash = GradientStash(self._parameters)

    def stepped_by_others(self, banned: frozenset[Worker]) -> frozenset[int]:
        return frozenset()

    def hold(self) -> None:
        self._stash.hold()

    def release(self) -> None:
        self._stash.release()

    def reduce(self, fractions: CleanFractions) -> None:
        for parameters, fraction in zip(self._untied.parameters, fractions.stages):
            scale_gradients(parameters, 1.0 / (self._replicas * fraction))
        self._untied.add_up()

    def clip(self, limit: float, by_value: bool) -> None:
        clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
        clip(self._untied.owners, limit)

    def apply(self, evaluate: Callable[[], Any] | None = None, **options: Any) -> Any:
        assert self._optimizer is not None, "an evaluation has no optimizer"
        result = self._optimizer.step(**options) if evaluate is None else self._optimizer.step(closure=evaluate, **options)
        self.discard()
        return result

    def discard(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
