"""Nested collections of tensors between ranks: a description in JSON, then the tensors. Nothing is ever unpickled.

What a description announces is compared with what there is room for before anything is allocated.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError

__all__ = ["broadcast_parcel", "free_bytes", "list_from", "pack", "receive_parcel", "reserve", "send_parcel", "unpack"]

_LONGEST_DESCRIPTION = 2**26


def free_bytes() -> int:
    """What a parcel may hold where the receiver has no reason to expect less, such as a stage's part of a checkpoint."""
    return int(psutil.virtual_memory().available)


def pack(tree: Any) -> tuple[bytes, list[Tensor]]:
    """A description, and the tensors that it leaves out, on the host.

    Args:
        tree: nested collections of tensors and of what JSON can say.

    Raises:
        PipelineModelError: if there is something else in it.

    Example:
        >>> description, tensors = pack({"image": torch.ones(2, 3), "name": "cat"})
        >>> unpack(description, tensors)["name"], [tuple(tensor.shape) for tensor in tensors]
        ('cat', [(2, 3)])
    """
    leaves, spec = tree_flatten(tree)
    tensors = [leaf.detach().cpu().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
    entries = [_layout(leaf) if isinstance(leaf, Tensor) else {"value": leaf} for leaf in leaves]
    try:
        described = treespec_dumps(spec)
        _require_no_names(json.loads(described)[1])
        return json.dumps([described, entries]).encode(), tensors
    except (TypeError, NotImplementedError) as error:
        kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
        raise PipelineModelError(
            f"Between processes travel tensors, numbers and text, in lists, tuples and dicts; here is {', '.join(kinds)} ({error})."
            " Return tensors, or collections of them."
        ) from error


def _layout(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def reserve(description: bytes, most_bytes: int | None = None) -> list[Tensor]:
    """Memory for the tensors of a parcel.

    Args:
        description: of the parcel.
        most_bytes: that there is room for; ``None`` is what the machine has free.

    Raises:
        MalformedMessageError: if the description is not one, or there is no room for so much.

    Example:
        >>> description, _ = pack([torch.ones(2, 3)])
        >>> reserve(description)[0].shape
        torch.Size([2, 3])
    """
    try:
        _, entries = json.loads(description)
        most_bytes = free_bytes() if most_bytes is None else most_bytes
        layouts = [(vars(torch)[entry["dtype"]], entry["shape"]) for entry in entries if "dtype" in entry]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedMessageError(f"What should describe a parcel does not: {description[:80]!r} ({error}).") from error
    total = 0
    for dtype, shape in layouts:
        fits = isinstance(dtype, torch.dtype) and isinstance(shape, list)
        if not fits or not all(type(size) is int and size >= 0 for size in shape):
            raise MalformedMessageError(f"A parcel announces a tensor of dtype {dtype} and shape {shape}, which there cannot be.")
        total += math.prod(shape) * dtype.itemsize
    if total > most_bytes:
        raise MalformedMessageError(f"A parcel announces {total} bytes, and there is room for {most_bytes}.")
    try:
        return [torch.empty(shape, dtype=dtype) for dtype, shape in layouts]
    except (RuntimeError, TypeError, OverflowError) as error:
        # Sizes beside a zero can be any, and a machine can have less memory than a checkpoint may need.
        raise MalformedMessageError(f"A parcel announces tensors that cannot be allocated ({error}).") from error


def unpack(description: bytes, tensors: list[Tensor]) -> Any:
    """The inverse of :func:`pack`.

    Raises:
        MalformedMessageError: if the description is not one.
    """
    arrived = iter(tensors)
    try:
        spec, entries = json.loads(description)
        _require_no_names(json.loads(spec)[1])
        return tree_unflatten([next(arrived) if "dtype" in entry else entry["value"] for entry in entries], treespec_loads(spec))
    except Exception as error:
        # What torch and the registered collections raise of a description that somebody made up can be anything.
        raise MalformedMessageError(f"What should describe a parcel does not: {description[:80]!r} ({error}).") from error


def _require_no_names(node: Any) -> None:
    """Torch imports what a ``defaultdict`` or an ``Enum`` in a description names; the sender is not to choose what.

    Raises:
        TypeError: if there is one.
    """
    found: list[Any] = []
    if isinstance(node["context"], str):
        with suppress(json.JSONDecodeError):
            json.loads(node["context"], object_hook=found.append)
    elif node["context"] is not None:
        found.append(node["context"])
    if found:
        raise TypeError(f"{node['type']} with {found[0]} cannot travel")
    for child in node["children_spec"]:
        _require_no_names(child)


def send_parcel(tree: Any, rank: int) -> None:
    """Send a collection to a rank that calls :func:`receive_parcel`."""
    description, tensors = pack(tree)
    dist.send(torch.tensor([len(description)]), rank)
    dist.send(torch.frombuffer(bytearray(description), dtype=torch.uint8), rank)
    for tensor in tensors:
        dist.send(tensor, rank)


def receive_parcel(rank: int, most_bytes: int | None = None) -> Any:
    """Receive a collection, on the host.

    Args:
        rank: of the sender.
        most_bytes: that there is room for; ``None`` is what the machine has free.

    Raises:
        MalformedMessageError: if what comes is no parcel, or too large.
    """
    length = torch.full((1,), -1)
    dist.recv(length, rank)
    data = torch.empty(_checked_length(int(length), rank), dtype=torch.uint8)
    dist.recv(data, rank)
    description = data.numpy().tobytes()
    try:
        tensors = reserve(description, most_bytes)
        for tensor in tensors:
            dist.recv(tensor, rank)
        return unpack(description, tensors)
    except MalformedMessageError as error:
        raise MalformedMessageError(f"Rank {rank} sent a malformed message. {error}", rank=rank) from error


def broadcast_parcel(tree: Any, source: int, group: dist.ProcessGroup | None = None) -> Any:
    """Bring a collection from one rank to all of a group.

    Args:
        tree: looked at on the source only.
        source: rank in the world.
        group: ``None`` is the world.

    Returns:
        the collection, on the host, on all ranks.
    """
    description, tensors = pack(tree) if dist.get_rank() == source else (b"", [])
    length = torch.tensor([len(description)])
    dist.broadcast(length, source, group=group)
    data = torch.frombuffer(bytearray(description), dtype=torch.uint8) if description else None
    if data is None:
        data = torch.empty(_checked_length(int(length), source), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    description = description or data.numpy().tobytes()
    try:
        tensors = tensors or reserve(description)
        for tensor in tensors:
            dist.broadcast(tensor, source, group=group)
        return unpack(description, tensors)
    except MalformedMessageError as error:
        raise MalformedMessageError(f"Rank {source} sent a malformed message. {error}", rank=source) from error


def list_from(rank: int, found: Any, length: int | None = None) -> list[Any]:
    """A collection that a rank sent, if it is a list, and as long as it should be.

    Raises:
        MalformedMessageError: if it is anything else.

    Example:
        >>> list_from(3, [1, 2], length=2)
        [1, 2]
        >>> list_from(3, None)
        Traceback (most recent call last):
        lightning_sentinel.errors.MalformedMessageError: Rank 3 sent NoneType where a list is due.
    """
    if isinstance(found, list) and length in (None, len(found)):
        return found
    what = f"a list of {len(found)}" if isinstance(found, list) else type(found).__name__
    due = "a list" if length is None else f"a list of {length}"
    raise MalformedMessageError(f"Rank {rank} sent {what} where {due} is due.", rank=rank)


def _checked_length(length: int, rank: int) -> int:
    if not 0 < length <= _LONGEST_DESCRIPTION:
        raise MalformedMessageError(f"Rank {rank} announces a description of {length} bytes, which there cannot be.", rank=rank)
    return length
