"""Data for the stages of a pipeline: its two ends read it, and all replicas stop together.

In the middle of a pipeline nobody looks at samples, so a worker there does not read any. From the first stage of its replica it is
told what each batch looks like, and gets one of zeros in its place, for hooks that ask a batch for its size.

Every step is a collective of all replicas. Where Lightning deals the samples of a data set, replicas have batches of the same
number and sizes. Where that is not certain, for an iterable data set or a sampler of the user's own, all ranks tell each other
before each batch whether they have one. Training ends with the first replica that has none; evaluation goes on with the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, default_collate

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.emptying import emptied
from lightning_sentinel.pipeline.data.fingerprints import NONE_LEFT, NOT_READ, compare_ends, fingerprint
from lightning_sentinel.pipeline.data.layout import describe, stand_in
from lightning_sentinel.pipeline.data.reading import Source, read

__all__ = ["Feed", "gather_numbers", "index_sampler", "is_even", "refuse_other_replicas", "seed_workers", "source_of"]

_TAG = 71
"""Batches are fetched ahead of the signals of a step, with which they share a connection."""
_LONGEST_DESCRIPTION = 2**26
_END = b"end"


def gather_numbers(numbers: list[int]) -> list[list[int]]:
    """Integers of all ranks, on all ranks; through the host."""
    gathered = torch.empty(dist.get_world_size(), len(numbers), dtype=torch.int64)
    dist.all_gather(list(gathered.unbind()), torch.tensor(numbers, dtype=torch.int64))
    return gathered.tolist()


def seed_workers(loader: Any, replica: int) -> None:
    """Let ``seed_everything(workers=True)`` seed a loader's processes by replica, so that its two ends draw the same numbers."""
    if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(loader, "worker_init_fn", 0) is None:
        loader.worker_init_fn = partial(pl_worker_init_function, rank=replica)


def index_sampler(loader: Any) -> _IndexBatchSamplerWrapper | None:
    """What Lightning remembers the indices of predicted samples with; ``None`` where it does not."""
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, _IndexBatchSamplerWrapper) else None


def refuse_other_replicas(loader: Any, num_replicas: int, rank: int, gathers: bool) -> None:
    """Raise ``ConfigurationError`` if a sampler deals to others than the replicas of this mesh; a collective if it gathers."""
    sampler = getattr(loader, "sampler", None)
    if not hasattr(sampler, "num_replicas"):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    right = [num_replicas, rank]
    said = [getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)]
    found = [number for number in said if isinstance(number, int)]
    # Who is the only one reads all samples, and so does everybody else who is.
    found = found if len(found) == len(right) and found != [1, 0] else right
    mine = [int(found != right), *found, *right]
    everyone = gather_numbers(mine) if gathers else [mine]
    for number, (is_wrong, replicas, own, many, its_own) in enumerate(everyone):
        if is_wrong:
            raise ConfigurationError(
                f"The sampler of a loader is for num_replicas={replicas}, rank={own} on rank {number}, but all stages of a pipeline"
                f" read the samples of one replica: there it has to be num_replicas={many}, rank={its_own}. Leave the sampler"
                " out, and Lightning adds the right one, or make it with **trainer.strategy.distributed_sampler_kwargs."
            )


def source_of(loader: Any) -> Source:
    """What a loader says of the batches that it gives, or each of several in a dict, a list or a tuple."""
    if isinstance(loader, Mapping):
        return Source(parts={key: source_of(one) for key, one in loader.items()})
    if isinstance(loader, (list, tuple)):
        return Source(parts=[source_of(one) for one in loader])
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None)
    try:
        # A data set of less than a batch has only a short one.
        known = isinstance(size, int) and len(sampler.sampler) >= size  # type: ignore[union-attr]
    except (AttributeError, TypeError, NotImplementedError):
        known = False
    return Source(size if known else None, getattr(loader, "collate_fn", None) is default_collate)


def is_even(loader: Any) -> tuple[bool, list[int]]:
    """Whether all replicas are certain to get batches of the same number and sizes, and the length on each rank; a collective.

    Returns:
        lengths are -1 where a loader does not know its own.
    """
    everyone = gather_numbers(_facts(loader))
    known = everyone[0][0]
    lengths = [facts[1] for facts in everyone]
    return bool(known) and all(facts == everyone[0] for facts in everyone), lengths


def _facts(loader: Any) -> list[int]:
    """Whether batches follow from the rest, their number, samples, batch size, and whether the last one may be short."""
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        return [0, -1, 0, 0, 0]
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, _IndexBatchSamplerWrapper):
        sampler = sampler._batch_sampler
    if type(sampler) is not BatchSampler or getattr(loader, "collate_fn", None) is not default_collate:
        return [0, length, 0, 0, 0]
    return [1, length, len(sampler.sampler), sampler.batch_size, sampler.drop_last]  # type: ignore[arg-type]


class Feed:
    """Stands in the place of a loader.

    Args:
        loader: the user's. What is asked of it otherwise, it answers itself.
        mesh: all workers.
        worker: that this rank is.
        dealer: knows how many samples a batch has.
        reads: whether workers in the middle of a pipeline read data too.
        even: as :func:`is_even` says.
        length: how many batches all ranks will go through; ``None`` if nobody knows.
        training: whether what is iterated now is for training.
        device: where stand-ins are.
        waiting: entered around waits for others.
    """

    def __init__(
        self,
        loader: Any,
        mesh: Mesh,
        worker: Worker,
        dealer: BatchSplitter,
        reads: bool,
        even: bool,
        length: int | None,
        training: Callable[[], bool],
        device: torch.device,
        waiting: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        middle = range(1, mesh.stages - 1)
        vars(self).update(
            _loader=loader,
            _mesh=mesh,
            _worker=worker,
            _splitter=dealer,
            _source=source_of(loader),
            _unread=() if reads else tuple(mesh.rank(Worker(stage, worker.replica)) for stage in middle),
            _reads=reads or worker.stage not in middle,
            _even=even,
            _length=length,
            _training=training,
            _device=device,
            _waiting=waiting,
            _under_way=[],
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self._loader).__name__} has no length on some rank")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        training = self._training()
        source = self._batches()
        latest: Any = torch.empty(0)
        while True:
            batch = next(source, _END)
            if not self._even:
                with self._waiting():
                    samples = self._agreed(batch)
                if max(samples) == NONE_LEFT or (training and min(samples) == NONE_LEFT):
                    _warn_of_leftovers(samples)
                    return
                if samples[self._worker.replica] == NONE_LEFT:
                    batch = self._empty(latest)
            if self._unread:
                with self._waiting():
                    batch = self._described(batch)
            if batch is _END:
                return
            latest = batch
            yield batch

    def _batches(self) -> Iterator[Any]:
        if self._reads:
            yield from self._loader
            return
        # Without the data set, but indices of predictions are asked of the sampler.
        for _ in index_sampler(self._loader) or ():
            yield None
        while True:
            yield None

    def _agreed(self, batch: Any) -> list[int]:
        """Samples of each replica's batch, ``NONE_LEFT`` for none."""
        mine = [NOT_READ, 0]
        if self._reads:
            mine = [NONE_LEFT, 0] if batch is _END else [self._samples(batch), fingerprint(batch, waits=False)]
        everyone = gather_numbers(mine)
        compare_ends(everyone, self._mesh)
        return [everyone[self._mesh.rank(Worker(0, replica))][0] for replica in range(self._mesh.replicas)]

    def _samples(self, batch: Any) -> int:
        return self._splitter.samples(batch, self._source)

    def _described(self, batch: Any) -> Any:
        """The first stage tells those in the middle what a batch looks like, and they make one up."""
        first = self._mesh.rank(Worker(0, self._worker.replica))
        if self._worker.stage == 0:
            for work, *_ in self._under_way:
                work.wait()
            message = _END if batch is _END else describe(batch, self._samples(batch))
            data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            pieces = [(rank, piece) for rank in self._unread for piece in (torch.tensor([len(message)]), data)]
            self._under_way[:] = [(dist.isend(piece, rank, tag=_TAG), piece) for rank, piece in pieces]
        if self._reads:
            return batch
        length = torch.empty(1, dtype=torch.int64)
        dist.recv(length, first, tag=_TAG)
        if not 0 < int(length) <= _LONGEST_DESCRIPTION:
            raise MalformedMessageError(f"Rank {first} announces a batch's description of {int(length)} bytes.", rank=first)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, first, tag=_TAG)
        message = data.numpy().tobytes()
        return _END if message == _END else stand_in(message, self._device)

    def _empty(self, latest: Any) -> Any:
        """A batch without samples, in the structure of the one before."""
        sampler = index_sampler(self._loader)
        if sampler is not None:
            sampler.seen_batch_indices.append([])
        # How a module deals batches of its own kind says nothing of how to leave everything out.
        return emptied(latest) if self._splitter.by_module else read(latest, self._source).part(slice(0))


def _warn_of_leftovers(samples: list[int]) -> None:
    if max(samples) != NONE_LEFT:
        without = [replica for replica, number in enumerate(samples) if number == NONE_LEFT]
        rank_zero_warn(
            f"The epoch ends here, because replica(s) {without} have no batch left, though others have: every training step needs"
            " one of each. Give all replicas the same number of batches to use all data."
        )
