"""Samples for lanes that work on those of other replicas.

Every replica loads its own samples, as under a distributed sampler. Once workers are banned, the first and the last stage of a lane
also work on micro-batches of replicas that have no lane any more, and get them from a worker of that replica that is not banned.
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
"""A micro-batch of another replica may be so many times as large as the batch of this one."""


class AssignedMicroBatch(NamedTuple):
    """One micro-batch of a lane.

    Args:
        part: whose samples they are.
        batch: what the loader gave, for these samples; ``None`` in the middle of a pipeline, where nobody looks at it.
        samples: how many.
        weight: the share of its replica's batch.
    """

    part: MicroBatchId
    batch: Any
    samples: int
    weight: float


class Delivery(NamedTuple):
    """A micro-batch on its way: from one rank to another."""

    part: MicroBatchId
    sender: int
    receiver: int


def supplier(part: MicroBatchId, stage: int, mesh: Mesh, banned: Collection[Worker], last_resort: Worker | None = None) -> Worker:
    """Who hands out the samples of a replica: of its workers that are not banned the one of this stage, else of the ends, else any.

    Args:
        part: whose samples.
        stage: that needs them.
        mesh: all workers.
        banned: workers that hand out nothing.
        last_resort: who is asked only if nobody else has them.

    Example:
        >>> supplier(MicroBatchId(1, 0), 0, Mesh(stages=3, replicas=2), {Worker(0, 1)})
        Worker(stage=2, replica=1)
    """
    order = sorted(range(mesh.stages), key=lambda s: (s != stage, s not in (0, mesh.stages - 1), s))
    workers = [worker for s in order if (worker := Worker(s, part.replica)) not in banned]
    return min(workers, key=lambda worker: worker == last_resort)


def deliveries(wiring: Wiring, mesh: Mesh, banned: Collection[Worker]) -> Iterator[Delivery]:
    """All that is to be sent before a step, in the order in which all ranks go through it.

    Example:
        >>> mesh, banned = Mesh(stages=2, replicas=2), {Worker(0, 1)}
        >>> [(tuple(one.part), one.sender, one.receiver) for one in deliveries(Wiring.of(mesh, banned), mesh, banned)]
        [((1, 0), 1, 2), ((1, 0), 1, 0)]
    """
    for lane in wiring.lanes:
        for part in wiring.work[lane]:
            for stage in sorted({0, mesh.stages - 1}):
                worker = wiring.worker(stage, lane)
                if worker.replica != part.replica:
                    yield Delivery(part, mesh.rank(supplier(part, stage, mesh, banned)), mesh.rank(worker))


class SampleExchange:
    """What a rank works on in a step.

    Args:
        mesh: all workers.
        worker: that this rank is.
        device: where batches are.
    """

    def __init__(self, mesh: Mesh, worker: Worker, device: torch.device) -> None:
        self._mesh = mesh
        self._worker = worker
        self._device = device
        self._largest = 0

    def of_step(self, own: MicroBatches, sizes: BatchSizes, wiring: Wiring, banned: Collection[Worker]) -> list[AssignedMicroBatch]:
        """The micro-batches of this rank's lane, but for empty ones; to be called by all ranks.

        Args:
            own: the micro-batches of this replica.
            sizes: of all replicas.
            wiring: who works on what.
            banned: workers that hand out nothing.
        """
        received: dict[MicroBatchId, AssignedMicroBatch] = {}
        rank = self._mesh.rank(self._worker)
        # A replica that has run out of samples still gets those of others.
        self._largest = max(self._largest, own.bytes)
        for part, sender, receiver in deliveries(wiring, self._mesh, banned):
            if not sizes.samples[part.replica]:
                continue
            if rank == sender:
                send_tree(self.packed(own, part), receiver)
            elif rank == receiver:
                found = unpacked(receive_tree(sender, _ROOM * self._largest), sender)
                received[part] = AssignedMicroBatch(part, move_data_to_device(found, self._device), *sizes.work(*part))
        lane = wiring.lane(self._worker)
        if lane is None:
            return []
        parts = [part for part in wiring.work[lane] if sizes.samples[part.replica]]
        return [received[part] if part in received else self._own(own, sizes, part) for part in parts]

    def _own(self, own: MicroBatches, sizes: BatchSizes, part: MicroBatchId) -> AssignedMicroBatch:
        # In the middle of a pipeline nobody looks at samples.
        looks = self._worker.stage in (0, self._mesh.stages - 1)
        return AssignedMicroBatch(part, own[part.micro_batch] if looks else None, *sizes.work(*part))

    def packed(self, own: MicroBatches, part: MicroBatchId) -> Any:
        """One of this replica's micro-batches as it is sent: samples, how many, and their share of the batch."""
        number = part.micro_batch
        return [own[number], own.sizes[number], own.weights[number]]


def unpacked(parcel: Any, sender: int) -> Any:
    """The samples in what :meth:`SampleExchange.packed` gave. All ranks know how many there are without the sender's word.

    Raises:
        MalformedMessageError: if it is something else.

    Example:
        >>> unpacked([{"x": 1}, 4, 0.5], sender=2)
        {'x': 1}
    """
    return list_from(sender, parcel, 3)[0]
