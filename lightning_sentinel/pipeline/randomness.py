"""Two streams of random numbers, one for the data and one for the computation.

The first and the last stage of a pipeline load the same batches in different processes. If dropout on one of them drew from the
generator that a random augmentation or a masking collate function draws from, inputs and labels would no longer belong together.
So the global generators serve the data, equally seeded on all ranks of a replica, and computation has a torch generator state of
its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.wiring import Part

__all__ = ["Draws", "SeparateRandomness", "base_seed", "generator_state", "seed_generators", "set_generator_state"]


def base_seed() -> int | None:
    """The seed of ``seed_everything``, if it was called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed is not None else None


class Draws(NamedTuple):
    """Decides the random numbers of one micro-batch's forward pass, whoever computes it, on whatever mesh.

    Args:
        seed: of the run.
        step: number of the training batch.
        micro_batch: number in the batch of the whole mesh; see :meth:`of`.

    Example:
        >>> import torch
        >>> draws = Draws(seed=1, step=5, micro_batch=0)
        >>> draws.seed_layer(2, torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> draws.seed_layer(2, torch.device("cpu"))
        >>> bool(first == torch.rand(1))
        True
    """

    seed: int
    step: int
    micro_batch: int

    @classmethod
    def of(cls, seed: int, step: int, part: Part, replicas: int) -> Draws:
        """Of a replica's micro-batch.

        Replicas are dealt the samples of a batch in turn, so micro-batch ``k`` of replica ``r`` is number ``k * replicas + r``.
        """
        return cls(seed, step, part.micro_batch * replicas + part.replica)

    def seed_layer(self, layer: int, device: torch.device) -> None:
        """To be called in front of a layer, by its number in the whole module."""
        seed_generators(device, derive_seed("layer", *self, layer))

    def seed_step(self, device: torch.device) -> None:
        """To be called in front of the user's step, which runs at both ends of the pipeline and has to draw the same there."""
        seed_generators(device, derive_seed("step", *self))


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed what a computation on ``device`` draws from."""
    # Not torch.manual_seed, which keeps a traceback of every call for each kind of device that was not used yet: milliseconds.
    torch.default_generator.manual_seed(seed)
    if (own := _own_generator(device)) is not None:
        own.manual_seed(seed)


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of what a computation on ``device`` draws from."""
    own = _own_generator(device)
    state: Tensor = torch.get_rng_state() if own is None else own.get_rng_state()
    return state


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Go on from what :func:`generator_state` gave."""
    own = _own_generator(device)
    (torch if own is None else own).set_rng_state(state)


def _own_generator(device: torch.device) -> Any:
    """What seeds the current device, if it is of a kind that draws its own random numbers; ``None`` if the host does."""
    module = None if device.type == "cpu" else torch.get_device_module(device.type)
    return module if hasattr(module, "get_rng_state") else None


class SeparateRandomness:
    """Seeds the data's generators now, and lends the computation its own.

    Args:
        seed: the same on all ranks.
        rank: seeds the computation.
        replica: seeds the data.

    Example:
        >>> import torch
        >>> randomness = SeparateRandomness(seed=1, rank=3, replica=0)
        >>> first = torch.rand(1)
        >>> randomness = SeparateRandomness(seed=1, rank=0, replica=0)
        >>> with randomness.of_computation():
        ...     _ = torch.rand(1)
        >>> bool(first == torch.rand(1))
        True
    """

    def __init__(self, seed: int, rank: int, replica: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed + 7919 * (rank + 1)) % 2**63)
            self._computation = torch.get_rng_state()
        random.seed(seed + replica)
        np.random.seed((seed + replica) % 2**32)
        torch.manual_seed(seed + replica)
        if torch.cuda.is_available():
            # Loaders draw on the host, so a GPU's generator serves the computation alone.
            torch.cuda.manual_seed_all((seed + 7919 * (rank + 1)) % 2**63)

    @contextmanager
    def of_computation(self) -> Iterator[None]:
        """Draw from the computation's generator inside, and from the data's again outside."""
        data = torch.get_rng_state()
        torch.set_rng_state(self._computation)
        try:
            yield
        finally:
            self._computation = torch.get_rng_state()
            torch.set_rng_state(data)

    def states(self, device: torch.device) -> dict[str, Tensor]:
        """Of the computation's generators, for a checkpoint."""
        states = {"torch": self._computation}
        if _own_generator(device) is not None:
            states[device.type] = generator_state(device)
        return states

    def load_states(self, states: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what :meth:`states` gave."""
        self._computation = states["torch"].to(torch.uint8).cpu()
        if device.type in states and _own_generator(device) is not None:
            set_generator_state(device, states[device.type].to(torch.uint8).cpu())
