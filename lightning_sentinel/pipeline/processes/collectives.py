"""Chooses the process group's backend, and runs collectives with any backend: on the device if possible, else through the host.

A device's own backend, such as NCCL, is fast and needs one device per rank. gloo sends tensors on the host, so several ranks may
share a device. ``transport`` decides between them, for collectives as for signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError

__all__ = ["all_gather", "all_reduce", "backend_for", "broadcast", "broadcast_each", "wire"]

_HOST = torch.device("cpu")


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


def wire(device: torch.device) -> torch.device:
    """The device from which the process group sends a device's tensors: that device, or the host."""
    if device.type == "cpu":
        return device
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return _HOST if backends.get(device.type, "gloo") == "gloo" else device


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All-gather a tensor: ``(ranks, ...)``, on the tensor's device."""
    message = tensor.to(wire(tensor.device))
    everyone = message.new_empty(dist.get_world_size(group), *message.shape)
    if message.numel():
        dist.all_gather(list(everyone.unbind()), message, group=group)
    return everyone.to(tensor.device)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """All-reduce (sum) a tensor over the ranks, in place."""
    message = tensor.to(wire(tensor.device))
    dist.all_reduce(message, group=group)
    if message is not tensor:
        tensor.copy_(message)


def broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup | None = None) -> None:
    """Broadcast a tensor from the global rank ``source``, in place."""
    broadcast_each([(tensor, source)], group)


def broadcast_each(sources: Iterable[tuple[Tensor, int]], group: dist.ProcessGroup | None = None) -> None:
    """Run several broadcasts concurrently: of each tensor, from the global rank that is given with it, in place."""
    rank = dist.get_rank()
    under_way = []
    for tensor, source in sources:
        message = tensor
        if (place := wire(tensor.device)) != tensor.device:
            message = tensor.to(place) if source == rank else torch.empty_like(tensor, device=place)
        under_way.append((tensor, message, dist.broadcast(message, source, group=group, async_op=True)))
    for tensor, message, work in under_way:
        work.wait()
        if message is not tensor:
            tensor.copy_(message)
