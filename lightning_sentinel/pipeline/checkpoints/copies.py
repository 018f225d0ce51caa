"""The replicas' copies of a stage's weights: which of them differ from those of most, before one of them is saved for all.

All replicas of a stage take the same steps, so that their weights are equal bit for bit. A worker whose copy is another one has a
device that errs, or alters it: it may work on the stage's weights all day and hand its own to a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.trust.digests import Algorithm, digest_of, digest_of_tensor

__all__ = ["odd_copies", "odd_workers"]


def odd_copies(parameters: Iterable[Tensor], mesh: Mesh, banned: Collection[Worker]) -> frozenset[Worker]:
    """The workers whose copies are not those of most of their stage, the same on all ranks; a collective.

    Args:
        parameters: of this rank's stage.
        mesh: all workers, one a rank.
        banned: workers whose copies are not kept up to date, and not compared.
    """
    # All ranks have this one, whatever else is installed.
    algorithm = Algorithm.SHA256
    digests = b"".join(digest_of_tensor(parameter.detach(), algorithm).encode() for parameter in parameters)
    own = torch.frombuffer(bytearray(digest_of(digests, algorithm).encode()), dtype=torch.uint8)
    everyone = [one.numpy().tobytes() for one in world().all_gather(own)]
    return odd_workers({worker: one for worker, one in zip(mesh.workers, everyone) if worker not in banned})


def odd_workers(copies: Mapping[Worker, bytes]) -> frozenset[Worker]:
    """The workers whose copies are not those of more than half of their stage; none of a stage in which no copy is.

    Args:
        copies: the digest of each worker's copy.

    Example:
        >>> odd_workers({Worker(0, 0): b"a", Worker(0, 1): b"b", Worker(0, 2): b"b", Worker(1, 0): b"c", Worker(1, 1): b"d"})
        frozenset({Worker(stage=0, replica=0)})
    """
    odd: set[Worker] = set()
    for stage in {worker.stage for worker in copies}:
        of_stage = {worker: copy for worker, copy in copies.items() if worker.stage == stage}
        (usual, count), *_ = Counter(of_stage.values()).most_common(1)
        if 2 * count > len(of_stage):
            odd.update(worker for worker, copy in of_stage.items() if copy != usual)
    return frozenset(odd)
