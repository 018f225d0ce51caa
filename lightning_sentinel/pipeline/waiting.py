"""Copies on the host of what a device computes: any number of them, for which it is waited once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["on_host", "on_its_way"]


def on_its_way(value: Tensor) -> Tensor:
    """A copy on the host, for which nobody waits: it is there once the device has been waited for.

    Of a tensor of the host, itself.
    """
    if value.device.type == "cpu":
        return value
    # Memory that may be paged out would be copied to while the host waits.
    there = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
    return there.copy_(value, non_blocking=True)


def on_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors on the host; a device is waited for once, and each tensor is copied once, however often it is asked for.

    Example:
        >>> one = torch.ones(2)
        >>> [found is one for found in on_host([one, one])]
        [True, True]
    """
    asked = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    copies = {id(tensor): on_its_way(tensor) for tensor in asked}
    for device in {tensor.device for tensor in asked if tensor.device.type != "cpu"}:
        # Copies are done in the order in which they were asked for, and for this one the host waits.
        torch.zeros((), device=device).cpu()
    return [copies[id(tensor)] for tensor in asked]
