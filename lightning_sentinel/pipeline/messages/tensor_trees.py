"""Sends tensor trees (nested collections of tensors) between ranks: a description in JSON, then the tensors. Nothing is unpickled.

The receiver compares the sizes that a description announces with its free memory before it allocates. A container that is no list,
tuple or dict keeps its class only if this process has seen that class in its own batches; otherwise it arrives as a plain dict or
tuple. So the sender cannot choose which class the receiver instantiates.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError
from lightning_sentinel.pipeline.messages.containers import entries_of, has_attributes, is_sequence
from lightning_sentinel.pipeline.processes.wire import Wire, world
from lightning_sentinel.pipeline.waiting import on_host

__all__ = [
    "Packed",
    "broadcast_tree",
    "describe_tree",
    "free_bytes",
    "learn_kinds",
    "list_from",
    "pack",
    "pack_all",
    "receive_tree",
    "reserve",
    "send_packed",
    "send_tree",
    "unpack",
]

Packed = tuple[bytes, list[Tensor]]
"""A tree's description in JSON, and its tensors."""

_LONGEST_DESCRIPTION = 2**26
_KINDS: dict[str, type] = {}
"""Container classes that this process may instantiate, by name."""
_NUMBERS = "biufc"
"""NumPy dtype kinds whose arrays are sent as tensors."""


def free_bytes() -> int:
    """Default limit on a tensor tree's size, where the receiver cannot expect less, as for a stage's part of a checkpoint."""
    return int(psutil.virtual_memory().available)


def learn_kinds(tree: Any) -> None:
    """Allow received tensor trees to instantiate the container classes that are in ``tree``."""
    if isinstance(tree, (Tensor, np.ndarray)):
        return
    held = list(tree) if is_sequence(tree) else [entry for _, entry in entries_of(tree, "")]
    if held and not is_sequence(tree):
        _KINDS[_name(tree)] = type(tree)
    for entry in held:
        learn_kinds(entry)


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def pack(tree: Any) -> Packed:
    """Split a tensor tree into its description and its tensors, on the host.

    Args:
        tree: nested collections of tensors, arrays, numbers and text.

    Raises:
        PipelineModelError: if it holds anything else.

    Example:
        >>> description, tensors = pack({"image": torch.ones(2, 3), "name": "cat"})
        >>> unpack(description, tensors)["name"], [tuple(tensor.shape) for tensor in tensors]
        ('cat', [(2, 3)])
    """
    return pack_all([tree])[0]


def pack_all(trees: Iterable[Any]) -> list[Packed]:
    """Like :func:`pack`, for several trees: waits only once for each device that holds tensors."""
    described = [describe_tree(tree) for tree in trees]
    tensors = iter(on_host(tensor for _, held in described for tensor in held))
    return [(description, [next(tensors).contiguous() for _ in held]) for description, held in described]


def describe_tree(tree: Any) -> Packed:
    """Like :func:`pack`, but leaves the tensors as and where they are: checks whether a tree can be sent.

    Raises:
        PipelineModelError: if it cannot.
    """
    tensors: list[Tensor] = []
    try:
        node = _encoded(tree, tensors)
        return json.dumps([node, [_layout(tensor) for tensor in tensors]]).encode(), tensors
    except (TypeError, RecursionError) as error:
        raise PipelineModelError(
            f"Between processes travel tensors, arrays, numbers and text, in lists, tuples, dicts, named tuples and dataclasses;"
            f" {error} cannot. Return tensors, or collections of them."
        ) from error


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    """A tree as JSON: plain values and lists as they are, everything else as a dict of its kind and its entries."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.str_):
        return str(value)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (np.ndarray, np.generic)):
        return _encoded_array(np.asarray(value), isinstance(value, np.generic), tensors)
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if is_sequence(value):
        entries = [_encoded(entry, tensors) for entry in value]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    if isinstance(value, Mapping):
        pairs = [[_encoded_key(key), _encoded(entry, tensors)] for key, entry in value.items()]
        return {"dict": pairs} if type(value) is dict else {"of": _name(value), "mapping": pairs}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"of": _name(value), "fields": [_encoded(entry, tensors) for entry in value]}
    if has_attributes(value):
        return {"of": _name(value), "attributes": [[name, _encoded(entry, tensors)] for name, entry in vars(value).items()]}
    raise TypeError(f"{type(value).__name__} ({' '.join(repr(value).split()):.60})")


def _encoded_key(key: Any) -> Any:
    if key is None or type(key) in (bool, int, float, str):
        return key
    raise TypeError(f"the key {key!r:.60}")


def _encoded_array(array: np.ndarray[Any, Any], scalar: bool, tensors: list[Tensor]) -> Any:
    if array.dtype.kind in "US":
        return {"texts": array.astype("U").ravel().tolist(), "shape": list(array.shape), "kind": array.dtype.kind}
    if array.dtype.kind not in _NUMBERS:
        raise TypeError(f"an array of {array.dtype}")
    # In native byte order and writable, as torch requires.
    tensors.append(torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="))))
    return {"scalar" if scalar else "array": len(tensors) - 1}


def _layout(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def reserve(description: bytes, most_bytes: int | None = None) -> list[Tensor]:
    """Allocate memory for the tensors of a received tree.

    Args:
        description: of the tree, as received.
        most_bytes: limit on the size of all tensors; ``None`` is the machine's free memory.

    Raises:
        MalformedMessageError: if the description is invalid, or announces more than ``most_bytes``.

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
        raise MalformedMessageError(f"What should describe nested data does not: {description[:80]!r} ({error}).") from error
    total = 0
    for dtype, shape in layouts:
        fits = isinstance(dtype, torch.dtype) and isinstance(shape, list)
        if not fits or not all(type(size) is int and size >= 0 for size in shape):
            raise MalformedMessageError(
                f"Nested data announces a tensor of dtype {dtype} and shape {shape}, which there cannot be."
            )
        total += math.prod(shape) * dtype.itemsize
    if total > most_bytes:
        raise MalformedMessageError(f"Nested data announces {total} bytes, and there is room for {most_bytes}.")
    try:
        return [torch.empty(shape, dtype=dtype) for dtype, shape in layouts]
    except (RuntimeError, TypeError, OverflowError) as error:
        # A tensor with one size of 0 may have any other sizes, and a checkpoint may need more memory than the machine has.
        raise MalformedMessageError(f"Nested data announces tensors that cannot be allocated ({error}).") from error


def unpack(description: bytes, tensors: list[Tensor]) -> Any:
    """The inverse of :func:`pack`.

    Raises:
        MalformedMessageError: if the description is invalid.
    """
    try:
        node, layouts = json.loads(description)
        used: list[int] = []
        tree = _decoded(node, tensors, used)
        if len(layouts) != len(tensors) or sorted(used) != list(range(len(tensors))):
            raise ValueError("not every tensor has one place")
        return tree
    except Exception as error:
        # Constructors may raise anything when given forged values.
        raise MalformedMessageError(f"What should describe nested data does not: {description[:80]!r} ({error}).") from error


def _decoded(node: Any, tensors: list[Tensor], used: list[int]) -> Any:
    if not isinstance(node, (dict, list)):
        return node
    if isinstance(node, list):
        return [_decoded(entry, tensors, used) for entry in node]
    for kind in ("tensor", "array", "scalar"):
        if kind in node:
            used.append(node[kind])
            tensor = tensors[node[kind]]
            return tensor if kind == "tensor" else tensor.numpy() if kind == "array" else tensor.numpy()[()]
    if "texts" in node:
        return _decoded_texts(**node)
    if "bytes" in node:
        return base64.b64decode(node["bytes"], validate=True)
    if "complex" in node:
        return complex(*node["complex"])
    if "size" in node:
        return torch.Size(node["size"])
    if "tuple" in node:
        return tuple(_decoded(entry, tensors, used) for entry in node["tuple"])
    if "fields" in node:
        fields = [_decoded(entry, tensors, used) for entry in node["fields"]]
        known = _KINDS.get(node["of"])
        return known(*fields) if known is not None and issubclass(known, tuple) else tuple(fields)
    pairs = next(node[name] for name in ("dict", "mapping", "attributes") if name in node)
    held = {key: _decoded(entry, tensors, used) for key, entry in pairs}
    return held if "dict" in node else _of_known_kind(node, held)


def _of_known_kind(node: dict[str, Any], held: dict[Any, Any]) -> Any:
    kind = _KINDS.get(node["of"])
    if kind is None:
        return held
    if "mapping" in node:
        try:
            made: Any = kind(held)
        except TypeError:
            return held
        return made if isinstance(made, Mapping) and list(made) == list(held) else held
    made = object.__new__(kind)
    for name, entry in held.items():
        if name.startswith("__"):
            raise ValueError(f"{name} is no attribute of a batch")
        # Works on frozen dataclasses too.
        object.__setattr__(made, name, entry)
    return made


def _decoded_texts(texts: list[str], shape: list[int], kind: str) -> np.ndarray[Any, Any]:
    # NumPy allocates the length of the longest text for every element.
    if max(map(len, texts), default=0) * len(texts) > _LONGEST_DESCRIPTION or kind not in ("U", "S"):
        raise ValueError("there is no room for such an array of texts")
    return np.array(texts, dtype=kind).reshape(shape)


def send_tree(tree: Any, rank: int) -> None:
    """Send a tensor tree to a rank that calls :func:`receive_tree`."""
    send_packed(pack(tree), rank)


def send_packed(packed: Packed, rank: int) -> None:
    """Like :func:`send_tree`, for a tree that :func:`pack` has split already."""
    description, tensors = packed
    wire = world()
    wire.send_bytes(description, rank)
    for tensor in tensors:
        wire.send(tensor, rank)


def receive_tree(rank: int, most_bytes: int | None = None) -> Any:
    """Receive a tensor tree, on the host.

    Args:
        rank: of the sender.
        most_bytes: limit on the size of all tensors; ``None`` is the machine's free memory.

    Raises:
        MalformedMessageError: if the message is no tensor tree, or too large.
    """
    wire = world()
    description = wire.receive_bytes(rank, _LONGEST_DESCRIPTION, "a description")
    try:
        tensors = reserve(description, most_bytes)
        for tensor in tensors:
            wire.receive(tensor, rank)
        return unpack(description, tensors)
    except MalformedMessageError as error:
        raise MalformedMessageError(f"Rank {rank} sent a malformed message. {error}", rank=rank) from error


def broadcast_tree(tree: Any, source: int, wire: Wire | None = None) -> Any:
    """Broadcast a tensor tree from one rank to all ranks of a wire.

    Args:
        tree: read on the source only.
        source: global rank of the sender.
        wire: ``None`` is that of all ranks.

    Returns:
        the tree, on the host, on all ranks.
    """
    wire = world() if wire is None else wire
    description, tensors = pack(tree) if wire.rank == source else (b"", [])
    description = wire.broadcast_bytes(description, source, _LONGEST_DESCRIPTION, "a description")
    try:
        tensors = tensors or reserve(description)
        for tensor in tensors:
            wire.broadcast(tensor, source)
        return unpack(description, tensors)
    except MalformedMessageError as error:
        raise MalformedMessageError(f"Rank {source} sent a malformed message. {error}", rank=source) from error


def list_from(rank: int, found: Any, length: int | None = None) -> list[Any]:
    """Return a received tree if it is a list, of ``length`` entries if that is given.

    Raises:
        MalformedMessageError: if it is not.

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
