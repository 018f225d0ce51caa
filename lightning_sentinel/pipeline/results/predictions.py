"""Sends what ``predict_step`` returned on the last stage to all ranks of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.messages.tensor_trees import broadcast_tree, list_from
from lightning_sentinel.pipeline.processes.wire import Wire
from lightning_sentinel.pipeline.results.joining import join
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["share_predictions"]


def share_predictions(
    results: Mapping[MicroBatchId, Any],
    mesh: Mesh,
    wiring: Wiring,
    worker: Worker,
    pipeline: Wire,
    sizes: BatchSizes | None = None,
    average: bool = False,
) -> Any:
    """Join what a step returned for a replica's micro-batches, on every rank of its pipeline.

    While every lane works on its own replica's samples, no rank waits for another pipeline.

    Args:
        results: on the last stage of a lane, what the step returned for each of its micro-batches.
        mesh: all workers.
        wiring: which lane worked on which micro-batches.
        worker: this rank's worker.
        pipeline: the wire of this replica's pipeline.
        sizes: of all replicas' batches; ``None`` if no list in a result is per sample.
        average: as in :func:`~lightning_sentinel.pipeline.results.joining.join`.

    Returns:
        tensors, or nested collections of them, with the samples along the first axis, on the host; ``None`` without samples.
    """
    last = mesh.stages - 1
    mine = {}
    if all(wiring.live):
        source = mesh.rank(Worker(last, worker.replica))
        found = list_from(source, broadcast_tree(list(results.values()), source, pipeline))
        mine = dict(zip(wiring.work[worker.replica], found))
    else:
        for micro_batch_id, (lane, _) in wiring.places.items():
            if wiring.live[lane]:
                found = broadcast_tree(results.get(micro_batch_id), mesh.rank(wiring.worker(last, lane)))
                if micro_batch_id.replica == worker.replica and (sizes is None or sizes.samples[micro_batch_id.replica]):
                    mine[micro_batch_id] = found
    ids = sorted(mine)
    return join(
        [mine[micro_batch_id] for micro_batch_id in ids],
        [sizes.work(*micro_batch_id)[0] if sizes else -1 for micro_batch_id in ids],
        average,
    )
