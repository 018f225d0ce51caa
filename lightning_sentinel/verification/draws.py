"""Private draws: what each worker decides by chance in a step, and which audits follow from that.

A schedule that all ranks derive from one secret would tell a liar when it is free. So each worker draws a number by itself, and
nobody else knows it before all have sent their signals and said what they sent. Which signals of its stage a worker recomputes
follows from its number alone. Where all workers decide something together, such as whom to ask first, it follows from all numbers.

Draws are independent: however seldom a worker lies, the number of lies that it has told when an audit meets one is geometrically
distributed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.verification.majority import most_liars

__all__ = ["NUMBER_BYTES", "Draws", "chance_of_each", "own_number", "surely_honest"]

NUMBER_BYTES = 16
"""Of the number that a worker draws: too many to try them all."""


def own_number(seed: int, worker: Worker, step: int) -> int:
    """What a worker draws in a step of a repeatable run, in place of a number that nobody can foresee.

    Args:
        seed: whoever knows it knows all draws.
        worker: who draws.
        step: number of the training batch.
    """
    said = f"private draws/{seed}/{worker.stage}/{worker.replica}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=NUMBER_BYTES).digest(), "big")


def surely_honest(live: int, muted: int = 0) -> int:
    """How many of those that can recompute a liar's signal are honest, whoever is malicious; at least one.

    The liar itself is one of those that may be malicious, and so are workers that have lost their word.

    Args:
        live: workers of the stage that are not banned.
        muted: how many of these have lost their word.

    Example:
        >>> [surely_honest(live) for live in (2, 3, 4, 5, 6)], surely_honest(6, muted=1)
        ([1, 2, 3, 3, 4], 4)
    """
    accomplices = max(0, most_liars(live) - 1 - muted)
    return max(1, live - 1 - muted - accomplices)


def chance_of_each(rate: float, honest: int) -> float:
    """With which chance each worker draws a signal, so that one of the honest ones draws it with the chance ``rate``.

    Args:
        rate: share of signals that an honest worker recomputes, in (0, 1].
        honest: how many draw for sure, from :func:`surely_honest`. Others may draw nothing, or anything.

    Raises:
        ConfigurationError: if ``rate`` is outside of its range.

    Example:
        >>> round(chance_of_each(0.01, honest=4), 6), chance_of_each(1.0, honest=4)
        (0.002509, 1.0)
    """
    if not 0 < rate <= 1:
        raise ConfigurationError(f"An audit rate of {rate} is no share of signals. Choose one above 0, and at most 1.")
    return 1 - (1 - rate) ** (1 / honest)


@dataclass(frozen=True)
class Draws:
    """What the workers of a mesh have drawn for a step, once all of them have said it.

    Args:
        numbers: of each worker, below ``2 ** 128``; a worker that has said none draws nothing.

    Example:
        >>> draws = Draws.seeded(Mesh(stages=2, replicas=3), seed=0, step=7)
        >>> draws.uniform(Worker(0, 1), "signals", 2, 3).shape, draws.uniform(Worker(9, 9), "signals", 1).tolist()
        (torch.Size([2, 3]), [1.0])
    """

    numbers: Mapping[Worker, int]

    @classmethod
    def seeded(cls, mesh: Mesh, seed: int, step: int) -> Draws:
        """The draws of a repeatable step: whoever knows the seed knows them.

        Args:
            mesh: all workers.
            seed: of the run.
            step: number of the training batch.
        """
        return cls({worker: own_number(seed, worker, step) for worker in mesh.workers})

    @cached_property
    def coin(self) -> int:
        """A seed that follows from the numbers of all workers: known to nobody before the last one has said its own."""
        said = "/".join(f"{worker.stage},{worker.replica},{number}" for worker, number in sorted(self.numbers.items()))
        return derive_seed("coin", said)

    def uniform(self, worker: Worker, what: str, *shape: int) -> Tensor:
        """Numbers between 0 and 1, float64, that follow from what one worker has drawn; all 1 if it has said nothing.

        Args:
            worker: who has drawn.
            what: for which decision: each has numbers of its own.
            shape: of the result.
        """
        number = self.numbers.get(worker)
        if number is None:
            return torch.ones(shape, dtype=torch.float64)
        return _uniform(derive_seed(number, what), *shape)

    def together(self, what: str, *shape: int) -> Tensor:
        """Numbers between 0 and 1, float64, that follow from what all workers have drawn."""
        return _uniform(derive_seed(self.coin, what), *shape)


def _uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
