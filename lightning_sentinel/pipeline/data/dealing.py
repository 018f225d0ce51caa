"""A whole mesh's batch, dealt to replicas and micro-batches as a distributed sampler would have dealt the samples."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sentinel.pipeline.data.micro_batches import MicroBatches

__all__ = ["deal"]


def deal(batch: Any, replicas: int, micro_batches: int) -> list[MicroBatches]:
    """Deal a batch to the replicas of a mesh.

    Replica ``r`` gets the samples ``r``, ``r + replicas`` and so on, which is what ``DistributedSampler`` gives it. A batch that
    cannot be divided evenly is filled up from its beginning, as the sampler fills up a data set.

    Args:
        batch: of all replicas together.
        replicas: of the mesh.
        micro_batches: of each replica.

    Raises:
        ConfigurationError: if a replica would have fewer samples than micro-batches.

    Example:
        >>> import torch
        >>> first, second = deal(torch.arange(8), replicas=2, micro_batches=2)
        >>> first[0], second[1]
        (tensor([0, 2]), tensor([5, 7]))
    """
    samples = extract_batch_size(batch)
    rows = -(-samples // replicas)
    order = torch.arange(rows * replicas) % samples

    def of(replica: int) -> Any:
        def part(leaf: Tensor) -> Tensor:
            mine = order[replica::replicas].to(leaf.device)
            return leaf[mine] if leaf.ndim and leaf.shape[0] == samples else leaf

        return apply_to_collection(batch, Tensor, part)

    return [MicroBatches(of(replica), micro_batches) for replica in range(replicas)]
