"""Gathers the predictions of all replicas in the order of the data, as a single process would return them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import lightning as L
import torch

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.feeding import gather_numbers, index_sampler
from lightning_sentinel.pipeline.messages.tensor_trees import broadcast_tree, list_from
from lightning_sentinel.pipeline.results.joining import join, reorder

__all__ = ["complete_predictions", "merge"]


def complete_predictions(trainer: L.Trainer, mesh: Mesh, banned: Collection[Worker]) -> None:
    """Merge the other replicas' predictions into the list that ``trainer.predict`` is about to return; a collective.

    A rank with ``return_predictions=False`` takes part, but keeps no predictions.
    """
    loop = trainer.predict_loop
    asks = bool(loop.return_predictions)
    # Lightning has already dropped the predictions of a rank with return_predictions=False.
    givers = [bool(numbers[0]) for numbers in gather_numbers([asks])]
    if not any(givers):
        return
    worker = mesh.worker(trainer.global_rank)
    assert loop._combined_loader is not None
    for number, loader in enumerate(loop._combined_loader.flattened):
        mine = [loop._predictions[number], _indices(loader)] if asks else []
        found = []
        for replica in range(mesh.replicas):
            ranks = [mesh.rank(Worker(stage, replica)) for stage in range(mesh.stages)]
            source = next((rank for rank in ranks if givers[rank] and mesh.worker(rank) not in banned), None)
            if source is not None:
                theirs = [list_from(source, one) for one in list_from(source, broadcast_tree(mine, source), 2)]
                found.append(mine if replica == worker.replica and mine else theirs)
        if asks:
            # In place, because the user gets this list object.
            loop._predictions[number][:] = merge([(predictions, indices) for predictions, indices in found])


def _indices(loader: Any) -> list[list[int]]:
    sampler = index_sampler(loader)
    return [] if sampler is None else [list(batch) for batch in sampler.seen_batch_indices]


def merge(replicas: Sequence[tuple[list[Any], list[list[int]]]]) -> list[Any]:
    """Merge the predictions of all replicas batch by batch, sorted by the samples' indices if those are known.

    Args:
        replicas: of each replica, the predictions for its batches, and the indices of the samples in each batch.

    Example:
        >>> import torch
        >>> merge([([torch.tensor([0, 20])], [[0, 2]]), ([torch.tensor([10, 30])], [[1, 3]])])
        [tensor([ 0, 10, 20, 30])]
    """
    merged = []
    for number in range(max((len(predictions) for predictions, _ in replicas), default=0)):
        parts = []
        indices = []
        for predictions, seen in replicas:
            if number < len(predictions) and predictions[number] is not None:
                parts.append(predictions[number])
                indices.append(seen[number] if number < len(seen) else [])
        joined = join(parts, [len(one) or -1 for one in indices])
        flat = torch.tensor([index for one in indices for index in one], dtype=torch.int64)
        merged.append(reorder(joined, flat) if any(indices) and all(map(bool, indices)) else joined)
    return merged
