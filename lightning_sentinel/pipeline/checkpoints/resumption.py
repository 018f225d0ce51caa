"""Saves and restores a run's position in its data and the states of its random number generators.

Lightning counts the batches of an epoch that are done, but a run resumed in the middle of an epoch starts its data anew. Here the
resumed run restores the generator states from the start of the epoch, then draws the batches already seen and drops them. So the
order of samples, and the random numbers of loader workers, are those of the run that was stopped.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from typing_extensions import override

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.randomness import SeparateRandomness

__all__ = ["DataPosition", "Unopened", "data_generators", "own_generators", "set_data_generators"]

States = dict[str, Tensor]


def data_generators() -> States:
    """The states of the random number generators that data loading uses: torch's, Python's and NumPy's, on the host.

    Example:
        >>> import random
        >>> before = data_generators()
        >>> first = random.random()
        >>> set_data_generators(before)
        >>> random.random() == first
        True
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }


def set_data_generators(states: Mapping[str, Tensor]) -> None:
    """Restore the generator states that :func:`data_generators` returned."""
    torch.set_rng_state(states["torch"].to(torch.uint8).cpu())
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(states["numpy_gauss"])))


def own_generators(
    saved: Mapping[int, Mapping[str, Tensor]], written_on: Mesh, processes: int, mesh: Mesh, rank: int, world_size: int
) -> States | None:
    """Select this rank's generator states from a checkpoint.

    Args:
        saved: generator states by rank; the checkpoint has none of banned workers.
        written_on: the mesh of the run that wrote the checkpoint.
        processes: number of processes of that run; a virtual mesh has one.
        mesh: the present mesh.
        rank: this process's rank.
        world_size: present number of processes.

    Returns:
        on the same mesh this rank's states. On a mesh with as many replicas, or if this rank has none, the data generators' states
        of another rank of its replica. Otherwise ``None``: the run then draws other random numbers than the stopped run.
    """
    if processes == world_size and written_on == mesh and rank in saved:
        return dict(saved[rank])
    if processes != written_on.size or world_size != mesh.size or written_on.replicas != mesh.replicas:
        return None
    replica = mesh.worker(rank).replica
    same_data = [other for other in sorted(saved) if written_on.worker(other).replica == replica]
    states = saved[same_data[0]] if same_data else {}
    return {name: state for name, state in states.items() if not name.startswith("computation/")} or None


class DataPosition(L.Callback):
    """Keeps the generator states from the start of the epoch, and moves a resumed run back to its position in the data."""

    def __init__(self) -> None:
        self.epoch_began = data_generators()
        """States of the data generators when the iterator over the present epoch was made."""
        self.unused: States | None = None
        """Generator states that a resumed run still has to restore; ``None`` once it has asked for a batch."""

    def begin(self) -> None:
        """Record the generator states just before the epoch's iterator is made."""
        self.epoch_began = data_generators()
        self.unused = None

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning makes the iterator of the first epoch earlier, and those of later epochs right after this hook.
        if trainer.current_epoch > 0 and not trainer.fit_loop.is_resuming and not trainer.fit_loop.restarting:
            if self.unused is not None:
                # The resumed epoch had no batches left.
                set_data_generators(_named(self.unused, "now"))
                self.unused = None
            self.epoch_began = data_generators()

    def states(self, trainer: L.Trainer, randomness: SeparateRandomness, device: torch.device) -> States:
        """The generator states to save: the present ones, those from the start of the epoch, and those of forward passes."""
        loop: Any = trainer.fit_loop
        # Batches fetched but not trained on: if the loader has no length, Lightning fetches one ahead.
        fetched = 0 if loop._data_fetcher is None else loop._data_fetcher.fetched
        ahead = torch.tensor(max(fetched - loop.epoch_loop.batch_progress.current.processed, 0))
        now = {f"now/{name}": state for name, state in data_generators().items()}
        began = {f"epoch/{name}": state for name, state in self.epoch_began.items()}
        return {
            "ahead": ahead,
            **now,
            **began,
            **{f"computation/{name}": state for name, state in randomness.states(device).items()},
        }

    def return_to(self, trainer: L.Trainer, states: States | None) -> None:
        """Make the resumed run's first batch the one after the last batch seen; to be called before the loop asks for it."""
        loop = trainer.fit_loop
        fetcher: Any = loop._data_fetcher
        loader = loop._combined_loader
        if fetcher is None or loader is None:
            return
        waiting = any(isinstance(one, Unopened) for one in loader.flattened)
        loader.flattened = [one.loader if isinstance(one, Unopened) else one for one in loader.flattened]
        fetcher.done = False
        if any(isinstance(one, _Stateful) for one in loader.flattened):
            # A stateful loader has restored its position by itself.
            if states is not None:
                set_data_generators(_named(states, "now"))
            if waiting:
                iter(fetcher)
            return
        self.unused = states
        fetcher.iterator = _Returning(self, trainer, loader, states)
        # If the loader has no length, Lightning has fetched one batch ahead, from the start of the data: drop it.
        ahead = len(getattr(fetcher, "batches", ()))
        if ahead:
            fetcher.batches.clear()
            fetcher.fetched -= ahead


class Unopened:
    """Wraps a loader and yields no batches, until a resumed run knows its position.

    Lightning makes the iterators of its loaders when a run starts. The batches that loader workers have prefetched by then, or a
    stream has given out, would be lost, because a resumed run does not use that iterator.

    Args:
        loader: the loader to open later. Its other attributes are available.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is copied
            raise AttributeError(name)
        return getattr(self.loader, name)


class _Returning(Iterator[Any]):
    """An iterator that skips the batches already seen when first asked for one: only then the loop knows how many they are."""

    def __init__(self, position: DataPosition, trainer: L.Trainer, loader: CombinedLoader, states: States | None) -> None:
        self._position = position
        self._trainer = trainer
        self._loader = loader
        self._states = states
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._return()
            batch = next(self._batches)
            self._look_ahead()
            return batch
        return next(self._batches)

    def _return(self) -> Iterator[Any]:
        """Yield the batches after the last one seen."""
        fit_loop: Any = self._trainer.fit_loop
        seen = fit_loop.epoch_loop.batch_progress.current.ready
        states = self._states
        ahead = 0 if states is None else int(states["ahead"])
        if fit_loop.epoch_loop.batch_progress.is_last_batch and not ahead:
            return  # the loop also asks at the end of an epoch without batches left; the next epoch opens its data by itself
        if states is not None:
            set_data_generators(_named(states, "epoch" if seen or ahead else "now"))
        for loader in self._loader.flattened:
            # Before iter(), because loader workers start to fetch as soon as there is an iterator.
            _set_sampler_epoch(loader, fit_loop.epoch_progress.current.processed)
        self._position.begin()
        batches = iter(self._loader)
        for _ in range(seen):
            next(batches)
        drawn = [next(batches) for _ in range(ahead)]
        if states is not None and (seen or ahead):
            # Callbacks, or a validation in the middle of the epoch, may have drawn random numbers too.
            set_data_generators(_named(states, "now"))
        yield from drawn
        # Not `yield from`, which calls iter() on the combined loader and starts anew.
        with contextlib.suppress(StopIteration):
            while True:
                yield next(batches)

    def _look_ahead(self) -> None:
        """Fetch one batch ahead, as Lightning does for a loader without a length, to recognise the last batch."""
        fetcher: Any = self._trainer.fit_loop._data_fetcher
        if fetcher.length is not None or not hasattr(fetcher, "batches"):
            return
        assert self._batches is not None
        try:
            fetcher.batches.append(next(self._batches))
            fetcher.fetched += 1
        except StopIteration:
            fetcher.done = True


def _named(states: Mapping[str, Tensor], kind: str) -> States:
    return {name.removeprefix(f"{kind}/"): state for name, state in states.items() if name.startswith(f"{kind}/")}
