"""Two streams of random numbers, one for the data and one for the computation.

The first and the last stage of a pipeline load the same batches in different processes. If dropout on one of them drew from the
generator that a random augmentation or a masking collate function draws from, inputs and labels would no longer belong together.
So the global generators (torch's, Python's and NumPy's) serve the data, alike on all ranks of a replica, and computation has
generators of its own, which are lent to it while it runs.

The user's generators are not seeded anew: the data of the first replica goes on drawing from them, and what is built after a run
draws what it would have drawn after one in a single process.
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
"""As NumPy documents it; its annotations leave out how generators are exchanged."""


def seed_of_state() -> int:
    """A seed that follows from where torch's global generator is, without drawing from it.

    Example:
        >>> first, again = seed_of_state(), seed_of_state()
        >>> drawn = torch.rand(1)
        >>> first == again, first == seed_of_state()
        (True, False)
    """
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


def seed_data(seed: int, replica: int) -> None:
    """Let the data of a replica but the first, which goes on from where the generators are, draw random numbers of its own."""
    if replica:
        own = derive_seed(seed, "data", replica)
        seed_generators(torch.device("cpu"), own)
        seed_host(own)


class MicroBatchSeeds(NamedTuple):
    """Decides the random numbers of one micro-batch's forward pass, whoever computes it, on whatever mesh.

    Args:
        seed: of the run.
        step: number of the training batch.
        micro_batch: number in the batch of the whole mesh; see :meth:`of`.

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
    def of(cls, seed: int, step: int, part: MicroBatchId, replicas: int) -> MicroBatchSeeds:
        """Of a replica's micro-batch.

        Replicas are dealt the samples of a batch in turn, so micro-batch ``k`` of replica ``r`` is number ``k * replicas + r``.
        """
        return cls(seed, step, part.micro_batch * replicas + part.replica)

    def seed_layer(self, layer: int, device: torch.device) -> int:
        """To be called in front of a layer, by its number in the whole module. Returns the seed, for :func:`seed_host`."""
        seed = derive_seed("layer", *self, layer)
        seed_generators(device, seed)
        return seed

    def seed_step(self, device: torch.device) -> None:
        """To be called in front of the user's step, which runs at both ends of the pipeline and has to draw the same there."""
        seed = derive_seed("step", *self)
        seed_generators(device, seed)
        seed_host(seed)

    def seed_answer(self) -> None:
        """To be called where a step goes on with what the pipeline answers, for one that draws with Python or NumPy.

        Torch's generators go on where they stood when the step called the pipeline. To remember where NumPy's stands, and to bring
        it back, would take a hundred times as long as to seed it.
        """
        seed_host(derive_seed("answer", *self))


def may_draw_on_host(layer: nn.Module) -> bool:
    """Whether a layer may draw with Python or NumPy: torch's own modules do not, others and their hooks may.

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
    """Tells whether something draws with Python or NumPy, for less than it takes to seed those.

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
        """Put both where what comes next is known."""
        random.setstate(self._python)
        np.random.seed(0)

    def moved(self) -> bool:
        """Whether something else comes next; asked once."""
        return random.getrandbits(64) != self._next or np.random.random_sample() != self._next_of_numpy


def seed_host(seed: int) -> None:
    """Seed Python's and NumPy's generators, which takes several times as long as torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


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


def _own_generator(device: torch.device) -> Any:
    """What seeds the current device, if it is of a kind that draws its own random numbers; ``None`` if the host does."""
    module = None if device.type == "cpu" else torch.get_device_module(device.type)
    return module if hasattr(module, "get_rng_state") else None


def remember_generators(device: torch.device) -> Callable[[], None]:
    """Take note of where torch's generators are that a computation on ``device`` may draw from. Returns what brings them back.

    Example:
        >>> go_back = remember_generators(torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> go_back()
        >>> bool(first == torch.rand(1))
        True
    """
    return partial(_set_torch_states, _torch_states(device), device)


class SeparateRandomness:
    """Lends the computation generators of its own.

    Args:
        seed: the same on all ranks.
        rank: gives each rank others.
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
        """Draw from the computation's generators inside, and from the data's again outside."""
        data = _torch_states(self._device)
        python = random.getstate()
        numpy_gauss: Any = np.random.get_state(legacy=False)
        # Another generator in its place, because to copy NumPy's state out and in takes a hundred times as long.
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
                # The second of a pair that was drawn, which is not kept by the generator that was exchanged.
                np.random.set_state(numpy_gauss)

    def states(self, device: torch.device) -> dict[str, Tensor]:
        """Of the computation's generators, for a checkpoint; Python's and NumPy's are seeded in every step."""
        return dict(self._torch)

    def load_states(self, states: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what :meth:`states` gave."""
        self._torch |= {name: states[name].to(torch.uint8).cpu() for name in self._torch if name in states}


def _torch_states(device: torch.device) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    return states | {device.type: generator_state(device)} if _own_generator(device) is not None else states


def _set_torch_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    own = _own_generator(device)
    if own is not None and device.type in states:
        own.set_rng_state(states[device.type])
