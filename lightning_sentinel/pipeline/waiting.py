"""Copies tensors from a device to the host, and waits for the device only once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["on_host", "on_its_way"]


def on_its_way(value: Tensor) -> Tensor:
    """Start a copy to the host without waiting: it is complete after the next wait for the device.

    A tensor on the host is returned itself.
    """
    if value.device.type == "cpu":
        return value
    # Pinned, because a copy into pageable memory makes the host wait.
    there = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
    return there.copy_(value, non_blocking=True)


def on_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copy tensors to the host: waits once per device, and copies each tensor once, even if it is listed several times.

    Example:
        >>> one = torch.ones(2)
        >>> [found is one for found in on_host([one, one])]
        [True, True]
    """
    asked = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    copies = {id(tensor): on_its_way(tensor) for tensor in asked}
    for device in {tensor.device for tensor in asked if tensor.device.type != "cpu"}:
        # Copies run in the order in which they were started, and for this last one the host waits.
        torch.zeros((), device=device).cpu()
    return [copies[id(tensor)] for tensor in asked]
