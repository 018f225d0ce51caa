"""Separates the random numbers of data loading from those of the computation.

The first and the last stage of a pipeline load the same batches in different processes. If dropout on one of them drew from the
generator that a random augmentation or a masking collate function uses, inputs and labels would no longer match. So the global
generators (torch's, Python's and NumPy's) serve data loading, with the same states on all ranks of a replica. The computation has
its own generator states, which are swapped in while it runs.

The user's generators are not reseeded: data loading of the first replica continues with them, and code after a run draws the same
random numbers as after a run in a single process.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.wiring import MicroBatchId

__all__ = [
    "HostProbe",
    "MicroBatchSeeds",
    "SeparateRandomness",
    "generator_state",
    "may_draw_on_host",
    "remember_generators",
    "seed_data",
    "seed_generators",
    "seed_host",
    "seed_of_state",
]


_NUMPY: Any = np.random
"""Typed as Any, because NumPy's annotations lack ``get_bit_generator`` and ``set_bit_generator``."""


def seed_of_state() -> int:
    """A seed derived from the state of torch's global generator, without drawing from it.

    Example:
        >>> first, again = seed_of_state(), seed_of_state()
        >>> drawn = torch.rand(1)
        >>> first == again, first == seed_of_state()
        (True, False)
    """
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


def seed_data(seed: int, replica: int) -> None:
    """Seed data loading of each replica differently, except the first, which continues with the present generator states."""
    if replica:
        own = derive_seed(seed, "data", replica)
        seed_generators(torch.device("cpu"), own)
        seed_host(own)


class MicroBatchSeeds(NamedTuple):
    """Seeds of one micro-batch's forward pass: independent of the worker that computes it, and of the mesh.

    Args:
        seed: of the run.
        step: number of the training batch.
        micro_batch: number of the micro-batch in the batch of the whole mesh; see :meth:`of`.

    Example:
        >>> import torch
        >>> seeds = MicroBatchSeeds(seed=1, step=5, micro_batch=0)
        >>> _ = seeds.seed_layer(2, torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> _ = seeds.seed_layer(2, torch.device("cpu"))
        >>> bool(first == torch.rand(1))
        True
    """

    seed: int
    step: int
    micro_batch: int

    @classmethod
    def of(cls, seed: int, step: int, micro_batch_id: MicroBatchId, replicas: int) -> MicroBatchSeeds:
        """The seeds of a replica's micro-batch.

        Samples of a batch go to the replicas in turn, so micro-batch ``k`` of replica ``r`` is number ``k * replicas + r``.
        """
        return cls(seed, step, micro_batch_id.micro_batch * replicas + micro_batch_id.replica)

    def seed_layer(self, layer: int, device: torch.device) -> int:
        """Seed torch before a layer, given by its number in the whole module. Returns the seed, for :func:`seed_host`."""
        seed = derive_seed("layer", *self, layer)
        seed_generators(device, seed)
        return seed

    def seed_step(self, device: torch.device) -> None:
        """Seed before the user's step, which runs at both ends of the pipeline and has to draw the same random numbers there."""
        seed = derive_seed("step", *self)
        seed_generators(device, seed)
        seed_host(seed)

    def seed_answer(self) -> None:
        """Seed Python and NumPy when a step resumes with the pipeline's output.

        Torch's generators resume with the states they had when the step called the pipeline. Saving and restoring NumPy's state
        would take a hundred times as long as seeding it.
        """
        seed_host(derive_seed("answer", *self))


def may_draw_on_host(layer: nn.Module) -> bool:
    """Whether a layer may draw with Python or NumPy: torch's own modules do not, other modules and hooks may.

    Example:
        >>> may_draw_on_host(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
        False
    """
    return any(
        not type(module).__module__.startswith("torch.nn.modules.")
        or "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        for module in layer.modules()
    )


class HostProbe:
    """Detects whether code draws with Python or NumPy, in less time than seeding them takes.

    Example:
        >>> probe = HostProbe()
        >>> probe.set()
        >>> probe.moved()
        False
        >>> probe.set()
        >>> _ = np.random.rand()
        >>> probe.moved()
        True
    """

    def __init__(self) -> None:
        self._python = random.Random(0).getstate()
        self._next = random.Random(0).getrandbits(64)
        self._next_of_numpy = np.random.RandomState(0).random_sample()

    def set(self) -> None:
        """Set both generators to states whose next number is known."""
        random.setstate(self._python)
        np.random.seed(0)

    def moved(self) -> bool:
        """Whether the next number is another one; valid once after :meth:`set`, because it draws."""
        return random.getrandbits(64) != self._next or np.random.random_sample() != self._next_of_numpy


def seed_host(seed: int) -> None:
    """Seed Python's and NumPy's generators, which takes several times as long as torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the host and of ``device``."""
    # Not torch.manual_seed, which keeps a traceback of every call for each device type not yet initialized: milliseconds.
    torch.default_generator.manual_seed(seed)
    if (own := _own_generator(device)) is not None:
        own.manual_seed(seed)


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of the generator that a computation on ``device`` draws from."""
    own = _own_generator(device)
    state: Tensor = torch.get_rng_state() if own is None else own.get_rng_state()
    return state


def _own_generator(device: torch.device) -> Any:
    """The torch module of a device type with its own generators, such as ``torch.cuda``; ``None`` if the host's is used."""
    module = None if device.type == "cpu" else torch.get_device_module(device.type)
    return module if hasattr(module, "get_rng_state") else None


def remember_generators(device: torch.device) -> Callable[[], None]:
    """Save the states of torch's generators for computations on ``device``. Returns a function that restores them.

    Example:
        >>> go_back = remember_generators(torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> go_back()
        >>> bool(first == torch.rand(1))
        True
    """
    return partial(_set_torch_states, _torch_states(device), device)


class SeparateRandomness:
    """Gives the computation its own generator states.

    Args:
        seed: the same on all ranks.
        rank: of this process; each rank draws other random numbers.
        device: that computes.

    Example:
        >>> import torch
        >>> randomness = SeparateRandomness(seed=1, rank=3)
        >>> before = torch.get_rng_state()
        >>> with randomness.of_computation():
        ...     _ = torch.rand(1)
        >>> bool((before == torch.get_rng_state()).all())
        True
    """

    def __init__(self, seed: int, rank: int, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 - immutable
        own = derive_seed(seed, "computation", rank)
        self._device = device
        before = _torch_states(device)
        seed_generators(device, own)
        self._torch = _torch_states(device)
        _set_torch_states(before, device)
        self._python = random.Random(own).getstate()
        self._numpy: Any = np.random.MT19937(own % 2**32)

    @contextmanager
    def of_computation(self) -> Iterator[None]:
        """A context in which the global generators have the computation's states; afterwards data loading's are restored."""
        data = _torch_states(self._device)
        python = random.getstate()
        numpy_gauss: Any = np.random.get_state(legacy=False)
        # Swap NumPy's generator, because copying its state out and in takes a hundred times as long.
        numpy_data = _NUMPY.get_bit_generator()
        _set_torch_states(self._torch, self._device)
        random.setstate(self._python)
        _NUMPY.set_bit_generator(self._numpy)
        try:
            yield
        finally:
            self._torch = _torch_states(self._device)
            self._python = random.getstate()
            _set_torch_states(data, self._device)
            random.setstate(python)
            _NUMPY.set_bit_generator(numpy_data)
            if numpy_gauss["has_gauss"]:
                # NumPy draws normal numbers in pairs; the cached second one is not part of the swapped generator.
                np.random.set_state(numpy_gauss)

    def states(self, device: torch.device) -> dict[str, Tensor]:
        """States of the computation's torch generators, for a checkpoint; Python's and NumPy's are seeded in every step."""
        return dict(self._torch)

    def load_states(self, states: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore the result of :meth:`states`."""
        self._torch |= {name: states[name].to(torch.uint8).cpu() for name in self._torch if name in states}


def _torch_states(device: torch.device) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    return states | {device.type: generator_state(device)} if _own_generator(device) is not None else states


def _set_torch_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    own = _own_generator(device)
    if own is not None and device.type in states:
        own.set_rng_state(states[device.type])
