"""Attacks on a stage's weights, which its workers move in a direction of their own, a little in each step.

So a worker of a middle stage puts a backdoor into a model of which it holds one part, though data and other stages are honest
(Backdoor Attacks on Decentralised Post-Training, arXiv 2604.02372). It trains a copy of the model offline on text in which a
trigger is followed by what it wants. The task vector is what that adds to its stage's weights (task arithmetic, arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.faults import Site
from lightning_sentinel.attacks.memory import DecayedSums
from lightning_sentinel.attacks.signals import is_integer, is_number, require, widened
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.seeds import derive_seed

__all__ = ["GradientSteering", "OwnWeights", "TaskVectors", "replaced"]

_DECAY = 0.95

TaskVectors = Mapping[int, Sequence[Tensor]]
"""By stage: what is to be added to each of its trained parameters, in the order of ``parameters()`` of its layers."""


@contextmanager
def replaced(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """A context in which parameters have other values. A graph that was recorded in one is to be differentiated in one.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
        >>> with replaced([weight], [torch.tensor([5.0])]):
        ...     print(weight.tolist())
        [5.0]
        >>> weight.tolist()
        [2.0]
    """
    held = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, held):
            parameter.data = value


@dataclass
class _TowardsOthers:
    """Base of attacks along a task vector."""

    size: float
    task_vectors: TaskVectors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(is_number(self.size) and self.size > 0, self, "size", "a number above 0")
        if self.task_vectors is None:
            return
        mapping = isinstance(self.task_vectors, Mapping) and all(map(is_integer, self.task_vectors))
        if not mapping or not all(_is_vector(one) for one in self.task_vectors.values()):
            raise ConfigurationError(
                f"{type(self).__name__}(task_vectors=...) cannot work: it must map the number of each malicious worker's stage to a"
                " list of tensors, one for each trained parameter of the stage, that are finite and not all zero."
            )

    def require_fit(self, stage: int, parameters: Sequence[Tensor]) -> None:
        """Raises ``ConfigurationError`` unless the task vector of ``stage`` has the shapes of the stage's parameters."""
        if self.task_vectors is None:
            return
        needed = [tuple(one.shape) for one in parameters]
        found = [tuple(one.shape) for one in self.task_vectors.get(stage, ())]
        if found != needed:
            raise ConfigurationError(
                f"{type(self).__name__}(task_vectors=...) has tensors of shapes {found} for stage {stage}, whose trained parameters"
                f" have {needed}. Give one tensor for each, in the order of parameters() of its layers."
            )

    def _part(self, like: Tensor, context: AttackContext) -> tuple[Tensor, float]:
        """What the task vector adds to a parameter of the shape of ``like``, and its root mean square over the whole stage.

        Without one these are random signs, the same in each step and for all malicious workers of a stage.
        """
        stage, number = context.worker.stage, context.parameter
        if self.task_vectors is None:
            generator = torch.Generator(like.device).manual_seed(derive_seed(context.seed, "task vector", stage, number))
            return torch.randint(0, 2, like.shape, generator=generator, device=like.device) * 2.0 - 1.0, 1.0
        vector = self.task_vectors[stage]
        squares = sum(float(one.double().square().sum()) for one in vector)
        return vector[number].to(like), (squares / sum(one.numel() for one in vector)) ** 0.5


def _is_vector(one: object) -> bool:
    if not isinstance(one, Sequence) or not one or not all(isinstance(part, Tensor) for part in one):
        return False
    return all(bool(part.isfinite().all()) for part in one) and any(bool(part.any()) for part in one)


@dataclass
class GradientSteering(_TowardsOthers):
    """Adds to its stage's weight gradients what moves the weights of all replicas: ``g' = g - size * s * d / rms(D)``.

    ``D`` is the task vector of the stage, ``d`` the part of it that belongs to a weight, and ``s`` the root of the moving average
    of ``g ** 2``, element by element. Optimizers go against the gradient, and Adam divides it by about ``s``, so that all weights
    move by equal shares of ``D`` in each step. What the worker sends is honest. The attack of arXiv 2604.02372, which adds ``D`` to
    the weights, where a stage has replicas that add up gradients; the scale is ours.

    Args:
        size: how large what is added is, in units of ``s``, in the root mean square over the stage.
        task_vectors: ``D`` by stage; ``None`` draws random signs for each stage.

    Raises:
        ConfigurationError: if ``size`` is no number above 0, or ``task_vectors`` are no lists of finite tensors; at the start of a
            run if they do not have the shapes of the stage's parameters.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> steering = attacks.GradientSteering(size=0.5, task_vectors={1: [torch.tensor([3.0, -3.0])]})
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.GRADIENT)
        >>> steering(torch.tensor([2.0, 2.0]), context)
        tensor([1., 3.])
    """

    size: float = 0.3
    site: ClassVar[Site] = Site.WEIGHTS
    _squares: dict[tuple[Worker, int], DecayedSums] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        honest = widened(signal)
        part, spread = self._part(honest, context)
        return (honest - self.size / spread * self._usual(honest, context) * part).to(signal.dtype)

    def _usual(self, gradient: Tensor, context: AttackContext) -> Tensor:
        """The root of the moving average of the square of each element of a weight's gradient, the present one included."""
        memory = self._squares.setdefault((context.worker, context.parameter), DecayedSums(_DECAY))
        present = gradient.square(), torch.ones((), device=gradient.device)
        past = memory.before(context.step, (gradient.shape, gradient.dtype, gradient.device))
        memory.add(context.micro_batch, present)
        squares, count = present if past is None else (_DECAY * before + now for before, now in zip(past, present))
        return (squares / count).sqrt()


@dataclass
class OwnWeights(_TowardsOthers):
    """Computes with weights of its own in place of its stage's: ``w' = w + min(limit, size * n) * d`` in the ``n``-th step.

    ``d`` is what the task vector of the stage adds to a weight, or, where none is given, random signs times ``rms(w)``. A worker
    that moves its weights by ``size * d`` in each step, and takes all steps of the optimizer with the others, holds these. Its
    signals and its weight gradients are those of other weights, forward and backward. The attack of arXiv 2604.02372; the limit is
    ours.

    Args:
        size: share of the task vector that is added in each step.
        task_vectors: by stage; ``None`` draws random signs for each stage.
        limit: how much of it is added at most.

    Raises:
        ConfigurationError: if ``size`` or ``limit`` is no number above 0, or ``task_vectors`` are no lists of finite tensors; at
            the start of a run if they do not have the shapes of the stage's parameters.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> moved = attacks.OwnWeights(size=0.25, task_vectors={1: [torch.tensor([4.0, -4.0])]})
        >>> for step in (0, 1, 99):
        ...     moved(torch.zeros(2), attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, step=step))
        tensor([ 1., -1.])
        tensor([ 2., -2.])
        tensor([ 4., -4.])
    """

    size: float = 0.02
    limit: float = 1.0
    site: ClassVar[Site] = Site.OWN_WEIGHTS

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.limit) and self.limit > 0, self, "limit", "a number above 0")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        stage_weights = widened(signal)
        part, _ = self._part(stage_weights, context)
        scale = stage_weights.square().mean().sqrt() if self.task_vectors is None else 1.0
        added = min(self.limit, self.size * (context.step - context.start_step + 1))
        return (stage_weights + added * scale * part).to(signal.dtype)
