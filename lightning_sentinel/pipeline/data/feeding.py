"""Feeds data to the stages of a pipeline: the first and last stage read it, and all replicas stop together.

Middle stages do not need samples, so their workers read none. The first stage of their replica describes each batch to them, and
they make a placeholder batch of zeros, for hooks that ask a batch for its size.

Every step is a collective of all replicas. Where Lightning's sampler splits a data set, all replicas have batches of the same
number and sizes. Where that is not certain, for an iterable data set or the user's own sampler, all ranks tell each other before
each batch whether they have one. Training ends with the first replica that has none; evaluation goes on with the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, default_collate

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.emptying import emptied
from lightning_sentinel.pipeline.data.fingerprints import NONE_LEFT, NOT_READ, compare_ends, fingerprint
from lightning_sentinel.pipeline.data.layout import describe, stand_in
from lightning_sentinel.pipeline.data.reading import Source, read
from lightning_sentinel.pipeline.processes.wire import world

__all__ = [
    "Feed",
    "ReadingProcess",
    "gather_numbers",
    "index_sampler",
    "is_even",
    "refuse_other_replicas",
    "seed_workers",
    "source_of",
]

_TAG = 71
"""Tag of batch descriptions, which are fetched ahead of a step's signals and share a connection with them."""
_LONGEST_DESCRIPTION = 2**26
_END = b"end"


def gather_numbers(numbers: list[int]) -> list[list[int]]:
    """All-gather integers of every rank, through the host."""
    gathered: list[list[int]] = world().all_gather(torch.tensor(numbers, dtype=torch.int64)).tolist()
    return gathered


def seed_workers(loader: Any, replica: int) -> None:
    """Make ``seed_everything(workers=True)`` seed loader processes by replica, so that both ends draw the same random numbers."""
    if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(loader, "worker_init_fn", 0) is None:
        loader.worker_init_fn = partial(pl_worker_init_function, rank=replica)


def index_sampler(loader: Any) -> _IndexBatchSamplerWrapper | None:
    """The wrapper in which Lightning records the indices of predicted samples; ``None`` where it records none."""
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, _IndexBatchSamplerWrapper) else None


def refuse_other_replicas(loader: Any, num_replicas: int, rank: int, gathers: bool) -> None:
    """Raise ``ConfigurationError`` if a sampler's replicas are not those of this mesh; a collective if ``gathers``."""
    sampler = getattr(loader, "sampler", None)
    if not hasattr(sampler, "num_replicas"):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    right = [num_replicas, rank]
    said = [getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)]
    found = [number for number in said if isinstance(number, int)]
    # num_replicas=1, rank=0 is allowed: such a sampler reads all samples on every rank.
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
    """What a loader tells of its batches, or each of several loaders in a dict, list or tuple."""
    if isinstance(loader, Mapping):
        return Source(parts={key: source_of(one) for key, one in loader.items()})
    if isinstance(loader, (list, tuple)):
        return Source(parts=[source_of(one) for one in loader])
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None)
    try:
        # A data set smaller than a batch gives only a short batch.
        known = isinstance(size, int) and len(sampler.sampler) >= size  # type: ignore[union-attr]
    except (AttributeError, TypeError, NotImplementedError):
        known = False
    return Source(size if known else None, getattr(loader, "collate_fn", None) is default_collate)


def is_even(loader: Any) -> tuple[bool, list[int]]:
    """Whether all replicas are certain to get batches of the same number and sizes, and each rank's length; a collective.

    Returns:
        the lengths are -1 for loaders without a length.
    """
    everyone = gather_numbers(_facts(loader))
    known = everyone[0][0]
    lengths = [facts[1] for facts in everyone]
    return bool(known) and all(facts == everyone[0] for facts in everyone), lengths


def _facts(loader: Any) -> list[int]:
    """Whether the rest determines the batches; their number; the samples; the batch size; whether the last batch is dropped."""
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


class ReadingProcess(NamedTuple):
    """A process, as its loaders see it.

    Args:
        mesh: all workers.
        worker: the worker that the process is.
        device: where placeholder batches are.
        waiting: a context entered around waits for other ranks.
    """

    mesh: Mesh
    worker: Worker
    device: torch.device
    waiting: Callable[[], AbstractContextManager[Any]]


class Feed:
    """Wraps the user's loader: keeps replicas in step and feeds placeholder batches to middle stages.

    Args:
        loader: the user's. Other attributes are read from it and set on it.
        process: this process.
        splitter: counts the samples of a batch.
        reads: whether workers of middle stages read data too.
        even: the first result of :func:`is_even`.
        length: how many batches all ranks iterate over; ``None`` if unknown.
        training: whether the present iteration is for training.
    """

    def __init__(
        self,
        loader: Any,
        process: ReadingProcess,
        splitter: BatchSplitter,
        reads: bool,
        even: bool,
        length: int | None,
        training: Callable[[], bool],
    ) -> None:
        mesh = process.mesh
        worker = process.worker
        middle = range(1, mesh.stages - 1)
        vars(self).update(
            _loader=loader,
            _mesh=mesh,
            _worker=worker,
            _splitter=splitter,
            _source=source_of(loader),
            _unread=() if reads else tuple(mesh.rank(Worker(stage, worker.replica)) for stage in middle),
            _reads=reads or worker.stage not in middle,
            _even=even,
            _length=length,
            _training=training,
            _device=process.device,
            _waiting=process.waiting,
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
        # Iterate over the sampler without the data set, because Lightning reads the indices of predictions from it.
        for _ in index_sampler(self._loader) or ():
            yield None
        while True:
            yield None

    def _agreed(self, batch: Any) -> list[int]:
        """Number of samples in each replica's batch; ``NONE_LEFT`` for a replica without a batch."""
        mine = [NOT_READ, 0]
        if self._reads:
            mine = [NONE_LEFT, 0] if batch is _END else [self._samples(batch), fingerprint(batch, waits=False)]
        everyone = gather_numbers(mine)
        compare_ends(everyone, self._mesh)
        return [everyone[self._mesh.rank(Worker(0, replica))][0] for replica in range(self._mesh.replicas)]

    def _samples(self, batch: Any) -> int:
        return self._splitter.samples(batch, self._source)

    def _described(self, batch: Any) -> Any:
        """Send a batch's description from the first stage to the middle stages, which make a placeholder batch from it."""
        first = self._mesh.rank(Worker(0, self._worker.replica))
        if self._worker.stage == 0:
            for sending in self._under_way:
                sending.wait()
            message = _END if batch is _END else describe(batch, self._samples(batch))
            self._under_way[:] = [sending for rank in self._unread for sending in world().send_bytes_later(message, rank, _TAG)]
        if self._reads:
            return batch
        message = world().receive_bytes(first, _LONGEST_DESCRIPTION, "a batch's description", _TAG)
        return _END if message == _END else stand_in(message, self._device)

    def _empty(self, latest: Any) -> Any:
        """A batch without samples, in the structure of the latest one."""
        sampler = index_sampler(self._loader)
        if sampler is not None:
            sampler.seen_batch_indices.append([])
        # A module's split_batch cannot make a batch without samples.
        return emptied(latest) if self._splitter.by_module else read(latest, self._source).part(slice(0))


def _warn_of_leftovers(samples: list[int]) -> None:
    if max(samples) != NONE_LEFT:
        without = [replica for replica, number in enumerate(samples) if number == NONE_LEFT]
        rank_zero_warn(
            f"The epoch ends here, because replica(s) {without} have no batch left, though others have: every training step needs"
            " one of each. Give all replicas the same number of batches to use all data."
        )
