"""Which backend ranks talk through, and collectives that work with any: on the device where its backend can, else through the host.

A device's own backend, such as NCCL, is fast and needs a device for every rank. gloo takes tensors of the host, and several ranks
may share a device then. Which one it is follows from ``transport``, for collectives as for signals.
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

    Host tensors go through gloo in any case, for headers and checkpoints.

    Args:
        device: of this process.
        devices: of all processes of this machine; where one is named twice, two of them share it.
        transport: of the strategy: ``"auto"``, ``"device"`` or ``"host"``.

    Raises:
        ConfigurationError: if signals are to be sent from the device, and cannot be.

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
    """Where the running process group sends tensors of a device from: the device itself, or the host."""
    if device.type == "cpu":
        return device
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return _HOST if backends.get(device.type, "gloo") == "gloo" else device


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """A tensor of each rank, ``(ranks, ...)``, where this rank's own is."""
    message = tensor.to(wire(tensor.device))
    everyone = message.new_empty(dist.get_world_size(group), *message.shape)
    if message.numel():
        dist.all_gather(list(everyone.unbind()), message, group=group)
    return everyone.to(tensor.device)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """The sum over the ranks, in place."""
    message = tensor.to(wire(tensor.device))
    dist.all_reduce(message, group=group)
    if message is not tensor:
        tensor.copy_(message)


def broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup | None = None) -> None:
    """The values of the rank ``source`` of the world, in place."""
    broadcast_each([(tensor, source)], group)


def broadcast_each(sources: Iterable[tuple[Tensor, int]], group: dist.ProcessGroup | None = None) -> None:
    """Several broadcasts that are under way at once: tensors, each with the rank of the world that it comes from."""
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
