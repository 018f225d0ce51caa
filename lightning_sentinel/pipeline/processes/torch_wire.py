"""The wire over ``torch.distributed``.

A device's own backend, such as NCCL, is fast and needs one device per rank. gloo sends tensors on the host, so several ranks may
share a device. ``transport`` decides between them, for collectives as for signals.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.processes.wire import Wire, Work

__all__ = ["TorchWire", "backend_for"]


def backend_for(device: torch.device, devices: Sequence[torch.device], transport: str) -> str:
    """The backend of the process group.

    Tensors on the host, such as headers and checkpoints, always go through gloo.

    Args:
        device: of this process.
        devices: of all processes of this machine; a device that two processes share is listed twice.
        transport: the strategy's setting: ``"auto"``, ``"device"`` or ``"host"``.

    Raises:
        ConfigurationError: if ``transport`` is ``"device"`` and the backend cannot send from the device.

    Example:
        >>> one, other = torch.device("cuda", 0), torch.device("cuda", 1)
        >>> backend_for(one, [one, other], "auto"), backend_for(one, [one, one], "auto"), backend_for(one, [one, other], "host")
        ('cpu:gloo,cuda:nccl', 'gloo', 'gloo')
    """
    own = "gloo" if device.type == "cpu" else dist.Backend.default_device_backend_map.get(device.type, "gloo")
    shared = device.type != "cpu" and len(set(devices)) < len(devices)
    if transport == "device" and device.type != "cpu" and (shared or own == "gloo"):
        why = f"{len(devices)} ranks share {', '.join(sorted({str(one) for one in devices}))}" if shared else "no backend does"
        raise ConfigurationError(
            f"transport='device' is to send from {device}, which cannot be: {why}. Use transport='auto' or 'host', which goes"
            " through host memory, or a device for every rank."
        )
    return "gloo" if shared or transport == "host" or own == "gloo" else f"cpu:gloo,{device.type}:{own}"


class TorchWire(Wire):
    """A process group of ``torch.distributed``.

    Args:
        timeout: with which the group was made.
        group: ``None`` is the default group, of all ranks.
        ranks: its members; ``None`` is all ranks.
    """

    def __init__(self, timeout: timedelta, group: dist.ProcessGroup | None = None, ranks: Sequence[int] | None = None) -> None:
        super().__init__(range(dist.get_world_size()) if ranks is None else ranks, timeout)
        self.group = dist.group.WORLD if group is None else group
        self._rank = dist.get_rank()
        self._everyone = self.group is dist.group.WORLD
        self._backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))

    @property
    @override
    def rank(self) -> int:
        return self._rank

    @property
    @override
    def is_closed(self) -> bool:
        return self._everyone and self.group is not dist.group.WORLD

    @override
    def device_for(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self._backends.get(device.type, "gloo") == "gloo" else device

    @override
    def _among(self, ranks: tuple[int, ...], timeout: timedelta) -> TorchWire:
        return TorchWire(timeout, dist.new_group(list(ranks), timeout=timeout), ranks)

    @override
    def _close(self) -> None:
        dist.destroy_process_group(self.group)

    @override
    def _send(self, tensor: Tensor, rank: int) -> None:
        dist.send(tensor, rank, group=self.group)

    @override
    def _send_later(self, tensor: Tensor, rank: int, tag: int) -> Work:
        work = dist.isend(tensor, rank, group=self.group, tag=tag)
        assert work is not None, "this rank is a member of the group"
        return work

    @override
    def _receive(self, tensor: Tensor, rank: int, tag: int) -> None:
        dist.recv(tensor, rank, group=self.group, tag=tag)

    @override
    def _all_gather(self, everyone: list[Tensor], tensor: Tensor) -> None:
        dist.all_gather(everyone, tensor, group=self.group)

    @override
    def _all_reduce(self, tensor: Tensor, largest: bool) -> None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self.group)

    @override
    def _broadcast(self, tensor: Tensor, source: int) -> Work:
        return dist.broadcast(tensor, source, group=self.group, async_op=True)

    @override
    def _barrier(self) -> None:
        dist.barrier(group=self.group)
