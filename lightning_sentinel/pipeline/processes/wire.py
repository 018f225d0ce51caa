"""The wire between ranks: everything that one rank sends to another goes through the functions of this file.

Whoever replaces ``torch.distributed`` by another transport replaces this file. All waits end after the timeout of their process
group; :meth:`~lightning_sentinel.pipeline.processes.liveness.Roster.watching` around them names the rank that was waited for.

A device's own backend, such as NCCL, is fast and needs one device per rank. gloo sends tensors on the host, so several ranks may
share a device. ``transport`` decides between them, for collectives as for signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError

__all__ = [
    "Group",
    "Sending",
    "all_gather",
    "all_reduce",
    "backend_for",
    "barrier",
    "broadcast",
    "broadcast_each",
    "broadcast_object",
    "device_of_wire",
    "drop_group",
    "is_connected",
    "make_group",
    "receive",
    "send",
    "send_later",
    "this_rank",
]

Group = dist.ProcessGroup
"""Some of the ranks."""

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


def device_of_wire(device: torch.device) -> torch.device:
    """The device from which the process group sends a device's tensors: that device, or the host."""
    if device.type == "cpu":
        return device
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return _HOST if backends.get(device.type, "gloo") == "gloo" else device


def is_connected() -> bool:
    """Whether this process has a process group."""
    return dist.is_initialized()


def this_rank() -> int:
    return dist.get_rank()


# ---------------------------------------------------------------------------------------------------------- from rank to rank


class Sending:
    """A tensor on its way.

    Args:
        work: what ``torch.distributed`` knows of it.
        tensor: that must not be written to before it has arrived.
    """

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work = work
        self._tensor = tensor

    def wait(self) -> None:
        """Wait until the receiver has it."""
        self._work.wait()


def send(tensor: Tensor, rank: int) -> None:
    """Send a tensor that is where :func:`device_of_wire` says, and wait until ``rank`` receives it."""
    dist.send(tensor, rank)


def send_later(tensor: Tensor, rank: int, tag: int = 0) -> Sending:
    """Send a tensor without waiting for its receiver.

    Args:
        tensor: where :func:`device_of_wire` says.
        rank: of the receiver.
        tag: keeps messages of one kind from being taken for those of another.
    """
    work = dist.isend(tensor, rank, tag=tag) if tag else dist.isend(tensor, rank)
    assert work is not None, "the default group has all ranks"
    return Sending(work, tensor)


def receive(tensor: Tensor, rank: int, tag: int = 0) -> None:
    """Receive into a tensor what ``rank`` sends with the same tag."""
    if tag:
        dist.recv(tensor, rank, tag=tag)
    else:
        dist.recv(tensor, rank)


# ---------------------------------------------------------------------------------------------------------------- collectives


def all_gather(tensor: Tensor, group: Group | None = None, size: int | None = None) -> Tensor:
    """All-gather a tensor: ``(ranks, ...)``, on the tensor's device.

    Args:
        tensor: of the same shape on all ranks; nothing is sent if it is empty.
        group: ``None`` is all ranks.
        size: how many ranks there are, if the caller knows.
    """
    message = tensor.to(device_of_wire(tensor.device))
    everyone = message.new_empty(dist.get_world_size(group) if size is None else size, *message.shape)
    if message.numel():
        if group is None:
            dist.all_gather(list(everyone.unbind()), message)
        else:
            dist.all_gather(list(everyone.unbind()), message, group=group)
    return everyone.to(tensor.device)


def all_reduce(tensor: Tensor, group: Group | None = None, largest: bool = False) -> None:
    """All-reduce a tensor over the ranks, in place: the sum, or the largest of each value."""
    message = tensor.to(device_of_wire(tensor.device))
    dist.all_reduce(message, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    if message is not tensor:
        tensor.copy_(message)


def broadcast(tensor: Tensor, source: int, group: Group | None = None) -> None:
    """Broadcast a tensor from the global rank ``source``, in place."""
    message = _to_broadcast(tensor, source)
    dist.broadcast(message, source, group=group)
    if message is not tensor:
        tensor.copy_(message)


def broadcast_each(sources: Iterable[tuple[Tensor, int]], group: Group | None = None) -> None:
    """Run several broadcasts concurrently: of each tensor, from the global rank that is given with it, in place."""
    under_way = []
    for tensor, source in sources:
        message = _to_broadcast(tensor, source)
        under_way.append((tensor, message, dist.broadcast(message, source, group=group, async_op=True)))
    for tensor, message, work in under_way:
        work.wait()
        if message is not tensor:
            tensor.copy_(message)


def _to_broadcast(tensor: Tensor, source: int) -> Tensor:
    place = device_of_wire(tensor.device)
    if place == tensor.device:
        return tensor
    return tensor.to(place) if source == this_rank() else torch.empty_like(tensor, device=place)


def broadcast_object(value: Any, source: int) -> Any:
    """Pickled, as Lightning does it at its start-up. What workers tell each other in a run is never pickled."""
    carrier = [value]
    dist.broadcast_object_list(carrier, source)
    return carrier[0]


def barrier() -> None:
    dist.barrier()


def make_group(ranks: Sequence[int], timeout: timedelta) -> Group:
    """A group of some ranks; for all ranks to call."""
    group: Group = dist.new_group(list(ranks), timeout=timeout)
    return group


def drop_group(group: Group) -> None:
    dist.destroy_process_group(group)
