"""Splits one replica's batch into micro-batches, and tells all ranks how every replica's batch is split."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lightning_sentinel.errors import ConfigurationError, PipelineModelError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch, Whole
from lightning_sentinel.pipeline.data.feeding import gather_numbers
from lightning_sentinel.pipeline.data.fingerprints import NOT_READ, compare_ends, fingerprint
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes, MicroBatches
from lightning_sentinel.pipeline.messages.tensor_trees import describe_tree, learn_kinds

__all__ = ["split_alike"]

_UNREADABLE = -3


def split_alike(
    batch: Any,
    loaded: Any,
    whole: Callable[[Any], Whole],
    at_most: int,
    mesh: Mesh,
    worker: Worker,
    *,
    reads: bool,
    asks: bool,
    waits: bool,
    travels: bool,
    by_module: bool,
    banned: Collection[Worker] = (),
) -> SplitBatch:
    """Split this replica's batch. If ``asks``, it is a collective, and an error on one rank is raised on all.

    Args:
        batch: of this rank's replica.
        loaded: the batch before it was moved to a device; ``None`` if that is unknown, or it was not moved.
        whole: prepares a batch for splitting.
        at_most: the number of micro-batches, unless the shortest batch has fewer samples.
        mesh: all workers.
        worker: this rank's worker.
        reads: whether the batch comes from a loader; if not, it is a placeholder.
        asks: whether to gather sizes and fingerprints: replicas may have batches of different sizes, or both ends are compared.
        waits: whether to wait for tensors on a device to compare them; ``loaded`` is compared in any case.
        travels: whether to check now that the batch can be sent between processes.
        by_module: whether the module decides how large micro-batches are.
        banned: workers whose sizes and fingerprints are ignored where possible.

    Raises:
        ConfigurationError: if this rank's batch, or another rank's, cannot be split.
        PipelineModelError: if the two ends of a pipeline have read different batches.
    """
    problem = None
    own = None
    try:
        own = whole(batch)
        mine = [own.samples, own.most(at_most), fingerprint([loaded, batch], waits) if asks and reads else 0]
        if travels and reads:
            _require_that_it_can_travel(batch)
    except ConfigurationError as error:
        mine = [_UNREADABLE, 0, 0]
        problem = error
    if asks:
        everyone = gather_numbers(mine if reads else [NOT_READ, 0, 0])
        troubled = [rank for rank, (samples, *_) in enumerate(everyone) if samples == _UNREADABLE]
        if troubled and problem is None:
            raise ConfigurationError(f"Rank {troubled[0]} has a batch that cannot be dealt into micro-batches; it says why.")
    if problem is not None or own is None:
        assert problem is not None
        raise problem
    if not asks:
        return SplitBatch(BatchSizes.of([mine[0]] * mesh.replicas, mine[1]), [own.dealt(mine[1])], mine[0])
    compare_ends([(samples, printed) for samples, _, printed in everyone], mesh, banned)
    of_replicas = [everyone[mesh.rank(_spokesman(replica, mesh, banned))] for replica in range(mesh.replicas)]
    samples = [numbers[0] for numbers in of_replicas]
    most = [numbers[1] for numbers in of_replicas if numbers[0]]
    sizes = BatchSizes.of(samples, min([*most, at_most]))
    dealt = own.dealt(sizes.micro_batches) if reads or not by_module else MicroBatches((), (0,) * sizes.micro_batches, None)
    if by_module:
        everyone = gather_numbers(list(dealt.sizes))
        by_replica = [everyone[mesh.rank(_spokesman(replica, mesh, banned))] for replica in range(mesh.replicas)]
        sizes = sizes._replace(dealt=tuple(map(tuple, by_replica)))
    return SplitBatch(sizes, [dealt], mine[0])


def _require_that_it_can_travel(batch: Any) -> None:
    learn_kinds(batch)
    try:
        describe_tree(batch)
    except PipelineModelError as error:
        raise ConfigurationError(
            f"When a worker is banned or audited, samples travel between processes, and those of this loader cannot. {error} Or let"
            " nobody be banned or audited: Response(ban_after=None, audit_rate=None)."
        ) from error


def _spokesman(replica: int, mesh: Mesh, banned: Collection[Worker]) -> Worker:
    """The worker whose size of a replica's batch counts: the first or last stage, if possible one that is not banned."""
    ends = [Worker(stage, replica) for stage in (0, mesh.stages - 1)]
    return min(ends, key=lambda end: end in banned)
