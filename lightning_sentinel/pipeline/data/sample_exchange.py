"""Sends samples to lanes that work on micro-batches of other replicas.

Every replica loads its own samples, as under a distributed sampler. Once workers are banned, a lane (a pipeline: one worker of each
stage) also works on micro-batches of replicas that have no lane any more. Its first and last stage get these micro-batches from a
worker of that replica that is not banned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes, MicroBatches
from lightning_sentinel.pipeline.messages.tensor_trees import list_from, receive_tree, send_tree
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["AssignedMicroBatch", "Delivery", "SampleExchange", "deliveries", "supplier", "unpacked"]

_ROOM = 16
"""Limit on the size of a received micro-batch, as a multiple of this replica's largest batch so far."""


class AssignedMicroBatch(NamedTuple):
    """One micro-batch of a lane.

    Args:
        micro_batch_id: its id.
        batch: its samples, as the loader gave them; ``None`` on middle stages, which do not need them.
        samples: number of samples.
        weight: its share of its replica's batch.
    """

    micro_batch_id: MicroBatchId
    batch: Any
    samples: int
    weight: float


class Delivery(NamedTuple):
    """A micro-batch that one rank sends to another."""

    micro_batch_id: MicroBatchId
    sender: int
    receiver: int


def supplier(
    micro_batch_id: MicroBatchId, stage: int, mesh: Mesh, banned: Collection[Worker], last_resort: Worker | None = None
) -> Worker:
    """The worker that sends a replica's samples. It is not banned, and serves ``stage`` if possible, else an end, else any stage.

    Args:
        micro_batch_id: the micro-batch to send.
        stage: of the worker that needs the samples.
        mesh: all workers.
        banned: workers that send no samples.
        last_resort: a worker to choose only if it is the only one.

    Example:
        >>> supplier(MicroBatchId(1, 0), 0, Mesh(stages=3, replicas=2), {Worker(0, 1)})
        Worker(stage=2, replica=1)
    """
    order = sorted(range(mesh.stages), key=lambda s: (s != stage, s not in (0, mesh.stages - 1), s))
    workers = [worker for s in order if (worker := Worker(s, micro_batch_id.replica)) not in banned]
    return min(workers, key=lambda worker: worker == last_resort)


def deliveries(wiring: Wiring, mesh: Mesh, banned: Collection[Worker]) -> Iterator[Delivery]:
    """Yield all micro-batches to send before a step, in the same order on all ranks.

    Example:
        >>> mesh, banned = Mesh(stages=2, replicas=2), {Worker(0, 1)}
        >>> [(tuple(one.micro_batch_id), one.sender, one.receiver) for one in deliveries(Wiring.of(mesh, banned), mesh, banned)]
        [((1, 0), 1, 2), ((1, 0), 1, 0)]
    """
    for lane in wiring.lanes:
        for micro_batch_id in wiring.work[lane]:
            for stage in sorted({0, mesh.stages - 1}):
                worker = wiring.worker(stage, lane)
                if worker.replica != micro_batch_id.replica:
                    yield Delivery(micro_batch_id, mesh.rank(supplier(micro_batch_id, stage, mesh, banned)), mesh.rank(worker))


class SampleExchange:
    """Exchanges samples between replicas before a step.

    Args:
        mesh: all workers.
        worker: this rank's worker.
        device: where batches are.
    """

    def __init__(self, mesh: Mesh, worker: Worker, device: torch.device) -> None:
        self._mesh = mesh
        self._worker = worker
        self._device = device
        self._largest = 0

    def of_step(self, own: MicroBatches, sizes: BatchSizes, wiring: Wiring, banned: Collection[Worker]) -> list[AssignedMicroBatch]:
        """The micro-batches of this rank's lane, except empty ones; to be called by all ranks.

        Args:
            own: the micro-batches of this replica.
            sizes: of all replicas' batches.
            wiring: which worker serves which lane, with which micro-batches.
            banned: workers that send no samples.
        """
        received: dict[MicroBatchId, AssignedMicroBatch] = {}
        rank = self._mesh.rank(self._worker)
        # The maximum, because a replica that has run out of samples still receives those of others.
        self._largest = max(self._largest, own.bytes)
        for micro_batch_id, sender, receiver in deliveries(wiring, self._mesh, banned):
            if not sizes.samples[micro_batch_id.replica]:
                continue
            if rank == sender:
                send_tree(self.packed(own, micro_batch_id), receiver)
            elif rank == receiver:
                found = unpacked(receive_tree(sender, _ROOM * self._largest), sender)
                received[micro_batch_id] = AssignedMicroBatch(
                    micro_batch_id, move_data_to_device(found, self._device), *sizes.work(*micro_batch_id)
                )
        lane = wiring.lane(self._worker)
        if lane is None:
            return []
        ids = [micro_batch_id for micro_batch_id in wiring.work[lane] if sizes.samples[micro_batch_id.replica]]
        return [
            received[micro_batch_id] if micro_batch_id in received else self._own(own, sizes, micro_batch_id)
            for micro_batch_id in ids
        ]

    def _own(self, own: MicroBatches, sizes: BatchSizes, micro_batch_id: MicroBatchId) -> AssignedMicroBatch:
        # Only the first and last stage look at samples.
        looks = self._worker.stage in (0, self._mesh.stages - 1)
        return AssignedMicroBatch(micro_batch_id, own[micro_batch_id.micro_batch] if looks else None, *sizes.work(*micro_batch_id))

    def packed(self, own: MicroBatches, micro_batch_id: MicroBatchId) -> Any:
        """One of this replica's micro-batches, ready to send: the samples, their number, and their share of the batch."""
        number = micro_batch_id.micro_batch
        return [own[number], own.sizes[number], own.weights[number]]


def unpacked(packed: Any, sender: int) -> Any:
    """The samples in a tree from :meth:`SampleExchange.packed`. Number and share are ignored: all ranks know them already.

    Raises:
        MalformedMessageError: if the tree has another form.

    Example:
        >>> unpacked([{"x": 1}, 4, 0.5], sender=2)
        {'x': 1}
    """
    return list_from(sender, packed, 3)[0]
