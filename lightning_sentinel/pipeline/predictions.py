"""What ``predict_step`` returned on the last stage, brought to all stages of its pipeline."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Mesh, Worker

__all__ = ["share_predictions"]


def share_predictions(parts: list[Any], mesh: Mesh, worker: Worker, group: dist.ProcessGroup) -> Any:
    """Join the predictions of a batch's micro-batches and give them to every rank of the pipeline.

    Args:
        parts: on the last stage, what ``predict_step`` returned for each micro-batch: tensors, or nested collections of them.
        group: the ranks of this pipeline.

    Raises:
        PipelineModelError: if there is something else than tensors in them.
    """
    source = mesh.rank(Worker(mesh.stages - 1, worker.replica))
    tensors: list[Tensor] = []
    description = b""
    if worker.stage == mesh.stages - 1:
        flat = [tree_flatten(part) for part in parts]
        leaves = [list(column) for column in zip(*(leaves for leaves, _ in flat))]
        for column in leaves:
            if not isinstance(column[0], Tensor):
                raise PipelineModelError(
                    f"predict_step returned a {type(column[0]).__name__} among its results. Between processes travel tensors only:"
                    " return tensors, or collections of them, with the samples along the first axis."
                )
        tensors = [torch.cat(column) if column[0].ndim else torch.stack(column) for column in leaves]
        layout = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        description = json.dumps([treespec_dumps(flat[0][1]), layout]).encode()
    size = torch.tensor([len(description)])
    dist.broadcast(size, source, group=group)
    header = (
        torch.frombuffer(bytearray(description), dtype=torch.uint8) if description else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(header, source, group=group)
    spec, layout = json.loads(bytes(header.tolist()))
    if worker.stage != mesh.stages - 1:
        tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in layout]
    on_host = [tensor.detach().cpu().contiguous() for tensor in tensors]
    for tensor in on_host:
        dist.broadcast(tensor, source, group=group)
    return tree_unflatten(on_host, treespec_loads(spec))
