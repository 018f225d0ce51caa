"""The interface of an attack, and its context: where and when the signal to corrupt is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_sentinel.attacks.products import Product
from lightning_sentinel.mesh import Direction, Worker
from lightning_sentinel.seeds import derive_seed

__all__ = ["Attack", "AttackContext"]


@dataclass(frozen=True, eq=False)
class AttackContext:
    """Where and when a signal is tampered with.

    Args:
        step: the optimizer step.
        micro_batch: index of the micro-batch within the step.
        worker: the malicious worker.
        direction: whether the signal is an activation or a gradient.
        received: the signal that the worker itself received in this direction: the activation of the stage before or the gradient
            of the stage after. At the pipeline's ends ``None``, or the input of the first stage, such as token ids. For a row, the
            row that is usual at its boundary.
        generator: source of randomness on the signal's device, fresh for every signal.
        seed: the adversary's seed, for draws that are not per signal: see :meth:`seed_for`.
        start_step: the first step that the adversary tampers with.
        colluding: whether all malicious workers draw the same: see :meth:`together`.
        product: the matrix product whose result is altered; ``None`` where something else is.
        parameter: which of its stage's trained parameters a weight or its gradient belongs to; 0 where something else is altered.
        about: the worker that a row, a note, a commitment or a vote speaks of: the sender of the signal, the worker whose signal is
            compared with the note, the other end of the message, the audited one; ``None`` for a signal.
        allies: all malicious workers.

    Example:
        >>> import torch
        >>> from lightning_sentinel.attacks import AttackContext
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = AttackContext.seeded(0, Worker(1, 0), Direction.GRADIENT, step=7)
        >>> context.step, torch.rand((2,), generator=context.generator).shape
        (7, torch.Size([2]))
    """

    step: int
    micro_batch: int
    worker: Worker
    direction: Direction
    received: Tensor | None
    generator: torch.Generator
    seed: int = 0
    start_step: int = 0
    colluding: bool = False
    product: Product | None = None
    parameter: int = 0
    about: Worker | None = None
    allies: frozenset[Worker] = frozenset()

    @property
    def about_ally(self) -> bool:
        """Whether a row, a note, a commitment or a vote speaks of a malicious worker."""
        return self.about in self.allies

    @classmethod
    def seeded(
        cls,
        seed: int,
        worker: Worker,
        direction: Direction,
        *,
        step: int = 0,
        micro_batch: int = 0,
        received: Tensor | None = None,
        device: torch.device | str = "cpu",
        start_step: int = 0,
        product: Product | None = None,
        parameter: int = 0,
    ) -> AttackContext:
        """A context whose generator, on ``device``, depends only on ``seed`` and on which signal or product this is."""
        generator = torch.Generator(device)
        context = cls(
            step, micro_batch, worker, direction, received, generator, seed, start_step, product=product, parameter=parameter
        )
        context.generator.manual_seed(derive_seed(seed, worker.stage, worker.replica, *context.place))
        return context

    @property
    def place(self) -> tuple[int | str, ...]:
        """Which of a worker's signals or products this is, for draws that are its own.

        Example:
            >>> from lightning_sentinel.attacks import AttackContext
            >>> from lightning_sentinel.mesh import Direction, Worker
            >>> AttackContext.seeded(0, Worker(1, 0), Direction.GRADIENT, step=7).place
            ('gradient', 7, 0)
        """
        product = () if self.product is None else (self.product.phase.value, self.product.number)
        return (self.direction.value, self.step, self.micro_batch, *product)

    def seed_for(self, *parts: int | str) -> int:
        """A seed for draws that other signals share: the same for the same ``parts``, run and worker.

        Example:
            >>> from lightning_sentinel.attacks import AttackContext
            >>> from lightning_sentinel.mesh import Direction, Worker
            >>> first, second = (AttackContext.seeded(0, Worker(1, replica), Direction.GRADIENT) for replica in (0, 1))
            >>> first.seed_for("pause", 7) == second.seed_for("pause", 7)
            False
            >>> first.together().seed_for("pause", 7) == second.together().seed_for("pause", 7)
            True
        """
        who: tuple[int | str, ...] = ("together",) if self.colluding else (self.worker.stage, self.worker.replica)
        return derive_seed(self.seed, *who, *parts)

    def together(self) -> AttackContext:
        """The same context with draws that depend on direction, step and micro-batch, and not on the worker."""
        shared = replace(self, colluding=True)
        generator = torch.Generator(device=self.generator.device)
        generator.manual_seed(shared.seed_for(*self.place))
        return replace(shared, generator=generator)


Attack = Callable[[Tensor, AttackContext], Tensor]
"""Takes the honest signal, leaves it unchanged, and returns the signal sent in its place: same shape, dtype and device."""
