"""What ``predict_step`` returned on the last stage, brought to the ranks that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.parcels import broadcast_parcel
from lightning_sentinel.wiring import Part, Wiring

__all__ = ["share_predictions"]


def share_predictions(results: Mapping[Part, Any], mesh: Mesh, wiring: Wiring, worker: Worker, pipeline: dist.ProcessGroup) -> Any:
    """Join the predictions of a replica's micro-batches on every rank of its pipeline.

    While every lane works on its own replica's samples no other pipeline is waited for.

    Args:
        results: on the last stage of a lane, what ``predict_step`` returned for each of its micro-batches.
        mesh: all workers.
        wiring: which lane worked on what.
        worker: that this rank is.
        pipeline: the ranks of this replica's pipeline.

    Returns:
        tensors, or nested collections of them, with the samples along the first axis, on the host.
    """
    last, mine = mesh.stages - 1, {}
    if all(wiring.live):
        source = mesh.rank(Worker(last, worker.replica))
        parts = broadcast_parcel(list(results.values()), source, pipeline)
        return _joined(parts)
    for part, (lane, _) in wiring.places.items():
        if wiring.live[lane]:
            found = broadcast_parcel(results.get(part), mesh.rank(wiring.worker(last, lane)))
            if part.replica == worker.replica:
                mine[part.micro_batch] = found
    return _joined([mine[number] for number in sorted(mine)])


def _joined(parts: list[Any]) -> Any:
    flat = [tree_flatten(part) for part in parts]
    columns = [list(column) for column in zip(*(leaves for leaves, _ in flat))]
    return tree_unflatten([_column(column) for column in columns], flat[0][1]) if flat else None


def _column(values: list[Any]) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0] if len(values) == 1 else values
    return torch.cat(values) if values[0].ndim else torch.stack(values)
