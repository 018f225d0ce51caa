"""Implements ``self.all_gather`` inside a step: over the replicas, as under DDP.

Lightning gathers over all ranks. Inside a step only the ranks that run it at the same time take part: the workers of one stage,
each for its own pipeline. They exchange tensors in pairs, so that they need no process group, which would change with every ban.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection, convert_to_tensors
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError, PipelineModelError
from lightning_sentinel.pipeline.messages.tensor_trees import receive_tree, send_tree

__all__ = ["Gathering"]

_ROOM = 2**20
"""Limit in bytes on a received tensor, beyond twice the size of this replica's."""


class Gathering:
    """Replaces ``LightningModule.all_gather`` while a step runs on a micro-batch.

    Args:
        ranks: returns the ranks that run the step on the micro-batch of the same number, in the order of their pipelines.
        rank: of this process.
        device: where results are.
        audited: whether another worker may have to run the step again, alone.
    """

    def __init__(self, ranks: Callable[[], Sequence[int]], rank: int, device: torch.device, audited: bool) -> None:
        self._ranks = ranks
        self._rank = rank
        self._device = device
        self._audited = audited

    def __call__(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """The signature of ``LightningModule.all_gather``.

        Returns:
            each tensor stacked over the replicas, ``(replicas, ...)``; with ``sync_grads`` gradients flow back to all replicas.

        Raises:
            ConfigurationError: if a group is given, or steps are audited.
        """
        if group is not None:
            raise ConfigurationError(
                "self.all_gather(..., group=...) in a step: the ranks that run a step change with every ban, so a group of one's"
                " own may wait for others in vain. Leave group out: then the replicas gather."
            )
        if self._audited:
            raise ConfigurationError(
                "self.all_gather in training_step: with audits another worker may have to run the step again, alone, and cannot"
                " gather. Use Response(audit_rate=None), or gather in a hook, such as on_train_batch_end."
            )

        ranks = tuple(self._ranks())

        def gather(tensor: Tensor) -> Tensor:
            with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
                return _Gather.apply(tensor, ranks, self._rank)

        return apply_to_collection(convert_to_tensors(data, device=self._device), Tensor, gather)


class _Gather(torch.autograd.Function):
    """All-gather of a tensor; its backward sums the gradients that all ranks have for this rank's tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: tuple[int, ...], rank: int) -> Tensor:
        ctx.ranks = ranks
        ctx.rank = rank
        gathered = _exchanged([tensor] * len(ranks), ranks, rank)
        shapes = [tuple(one.shape) for one in gathered]
        if len(set(shapes)) > 1:
            raise PipelineModelError(
                f"self.all_gather in a step: the replicas have tensors of shapes {shapes}, which cannot be stacked. Gather tensors"
                " that do not depend on the number of samples, or use drop_last=True."
            )
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.stack(_exchanged(list(gradient.unbind()), ctx.ranks, ctx.rank)).sum(dim=0), None, None


def _exchanged(pieces: Sequence[Tensor], ranks: tuple[int, ...], rank: int) -> list[Tensor]:
    """Send each rank its piece (all-to-all).

    All ranks go through their peers in the same order, and in each pair the earlier rank sends first, so there is no deadlock.

    Returns:
        the piece that each rank had for this one.
    """
    me = ranks.index(rank)
    received = list(pieces)
    room = 2 * pieces[me].numel() * pieces[me].element_size() + _ROOM
    for number, (peer, piece) in enumerate(zip(ranks, pieces)):
        if number == me:
            continue
        if me < number:
            send_tree(piece, peer)
        came = receive_tree(peer, room)
        if me > number:
            send_tree(piece, peer)
        if not isinstance(came, Tensor):
            raise PipelineModelError(
                f"self.all_gather in a step: rank {peer} has no tensor here. Let all replicas gather the same."
            )
        received[number] = came.to(piece.device)
    return received
