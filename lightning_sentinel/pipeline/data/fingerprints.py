"""Checks that both ends of a pipeline read the same batch: mismatched inputs and labels raise no error of their own."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.messages.containers import leaves_of
from lightning_sentinel.pipeline.waiting import on_host

__all__ = ["NONE_LEFT", "NOT_READ", "compare_ends", "fingerprint"]

_ELEMENTS = 512
"""Elements of a tensor that its fingerprint covers."""
_LEAVES = 64
"""Leaves of a batch that its fingerprint covers."""
NONE_LEFT = -1
NOT_READ = -2
"""Sent in place of a number of samples: the replica has no batch left; the rank does not read data."""
_REMEDY = (
    "Both ends of a pipeline read the same data. What is drawn before fit() has to be drawn alike in all processes: call"
    " L.seed_everything(...) first, or give random_split, shuffling and samplers a generator with a seed. What a data set or a"
    " sampler gives may depend on trainer.strategy.distributed_sampler_kwargs['rank'], and not on the global rank or on chance."
)


def fingerprint(batch: Any, waits: bool = True) -> int:
    """A checksum of a batch: of the shapes, dtypes and some elements of its tensors.

    Args:
        batch: from the loader.
        waits: whether to wait, once, for elements on a device; if not, only the shapes and dtypes of such tensors count.

    Example:
        >>> one, same, other = torch.arange(4), torch.arange(4), torch.arange(1, 5)
        >>> fingerprint([one, "a"]) == fingerprint([same, "a"]), fingerprint([one, "a"]) == fingerprint([other, "a"])
        (True, False)
    """
    leaves = list(leaves_of(batch))
    digest = zlib.crc32(str(len(leaves)).encode())
    looked_at = [(leaf, _some(leaf, waits)) for leaf in leaves[:: max(1, len(leaves) // _LEAVES)]]
    elements = iter(on_host(some for _, some in looked_at if some is not None))
    for leaf, some in looked_at:
        digest = zlib.crc32(_bytes_of(leaf, None if some is None else next(elements)), digest)
    return digest


def _some(leaf: Any, waits: bool) -> Tensor | None:
    """Some elements of a tensor, on its device; ``None`` if they are not available."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_nested:
        return None
    return leaf.detach().reshape(-1)[:: max(1, leaf.numel() // _ELEMENTS)] if waits or leaf.device.type == "cpu" else None


def _bytes_of(leaf: Any, some: Tensor | None) -> bytes:
    if isinstance(leaf, np.ndarray):
        head = f"{leaf.dtype} {leaf.shape} ".encode()
        few = leaf.reshape(-1)[:: max(1, leaf.size // _ELEMENTS)]
        return head + (b"" if leaf.dtype.hasobject else few.tobytes())
    if not isinstance(leaf, Tensor):
        # The repr of other objects may contain a memory address.
        return repr(leaf).encode() if isinstance(leaf, (str, bytes, bool, int, float, complex)) else type(leaf).__name__.encode()
    head = f"{leaf.dtype} {tuple(leaf.shape)} ".encode()
    return head if some is None else head + some.contiguous().view(torch.uint8).numpy().tobytes()


def compare_ends(said: Sequence[Sequence[int]], mesh: Mesh, banned: Collection[Worker] = ()) -> None:
    """Raise ``PipelineModelError``, on all ranks, if the two ends of a pipeline have read different batches.

    Args:
        said: of each rank, its batch's number of samples and fingerprint.
        mesh: all workers.
        banned: workers whose pipelines are not compared.
    """
    for replica in range(mesh.replicas):
        ends = [Worker(stage, replica) for stage in (0, mesh.stages - 1)]
        first, last = (tuple(said[mesh.rank(worker)]) for worker in ends)
        if first == last or (banned and not set(ends).isdisjoint(banned)):
            continue
        if first[0] != last[0]:
            raise PipelineModelError(
                f"The first stage of replica {replica} read a batch of {_told(first[0])}, the last one {_told(last[0])}. {_REMEDY}"
            )
        raise PipelineModelError(
            f"The first and the last stage of replica {replica} read different batches of {_told(first[0])}: inputs would be"
            f" trained on the labels of others. {_REMEDY}"
        )


def _told(samples: int) -> str:
    return "nothing" if samples == NONE_LEFT else f"{samples} sample(s)"
