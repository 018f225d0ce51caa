"""Builds a module without allocating it, then materialises only one process's tensors, with the values of a full build.

Inside :class:`DeferredBuild` tensors have shapes but no values, and operations on them are recorded. Random numbers are drawn
immediately and discarded, but the generator's state before the draw is kept, so that each tensor's can be drawn again separately.
Building takes the time of a full build, and the memory of the largest tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from typing_extensions import Self

__all__ = ["DeferredBuild"]


class _View(NamedTuple):
    """A tensor, described as a view of a storage."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Draw(NamedTuple):
    """A generator, and its state before a draw."""

    generator: torch.Generator
    state: Tensor


class _Operation(NamedTuple):
    function: Any
    leaves: list[Any]
    """Flattened arguments; tensors of the build as :class:`_View`."""
    structure: Any
    reads: frozenset[int]
    writes: frozenset[int]
    makes: tuple[int | None, ...]
    """For each result tensor, its storage if the operation created it, else ``None``."""
    draw: _Draw | None


class DeferredBuild(TorchDispatchMode):
    """Records how tensors are made. Tensors that are put on the ``meta`` device on purpose are left alone.

    Example:
        >>> import torch
        >>> state = torch.manual_seed(1)
        >>> build = DeferredBuild()
        >>> with build:
        ...     layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
        >>> (value,) = build.values([layers[1].weight])
        >>> state = torch.manual_seed(1)
        >>> bool((torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))[1].weight == value).all())
        True
    """

    def __init__(self) -> None:
        super().__init__()
        # Fake tensors rather than the meta device: torch's initialisers skip meta tensors.
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self._operations: list[_Operation] = []
        # Keeps the storages alive, so that no other one gets the address that identifies one of them.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._copies = _Copies()
        self._nowhere = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor was made in this build, and has no value yet."""
        return isinstance(tensor, FakeTensor) and _place(tensor) in self._storages

    def has_value(self, tensor: Tensor) -> bool:
        """Whether a tensor of this build was ever given a value, rather than only allocated."""
        place = _place(tensor)
        return any(
            place in operation.writes or (place in operation.makes and "empty" not in operation.function.__name__)
            for operation in self._operations
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        leaves, structure = tree_flatten((args, kwargs or {}))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        creates = not given and any(argument.name == "device" for argument in func._schema.arguments)
        device = torch.device((kwargs or {}).get("device") or "cpu")
        if not any(map(self.knows, given)) and (not creates or device.type == "meta"):
            return func(*args, **(kwargs or {}))  # all arguments have values: constants
        written = _written(func, args, kwargs or {})
        if not all(map(self.knows, written)):
            return self._with_values(func, leaves, structure)
        try:
            with self._shapes:
                results = func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._with_values(func, leaves, structure)
        # The memo holds weak references, with which Module.to(dtype) could not replace parameters.
        self._shapes.fake_tensor_converter.meta_converter.tensor_memo.clear()
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        makes = tuple(None if self.knows(tensor) else _place(tensor) for tensor in made)
        if not written and all(place is None for place in makes):
            return results  # views need no record: their storage identifies them
        if creates and any(argument.name == "dtype" for argument in func._schema.arguments):
            # Record the dtype explicitly: the default may have changed when the operation is replayed.
            leaves, structure = tree_flatten((args, {**(kwargs or {}), "dtype": made[0].dtype}))
        draw = self._drawn(func, leaves, structure, written, made[0].device) if _draws(func) else None
        self._storages.update({_place(tensor): tensor.untyped_storage() for tensor in made})
        reads, writes = (frozenset(_place(t) for t in tensors if self.knows(t)) for tensors in (given, written))
        held = [self._held(leaf) for leaf in leaves]
        self._operations.append(_Operation(func, held, structure, reads, writes, makes, draw))
        return results

    def _with_values(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        """Run an operation immediately that cannot be deferred, such as reading a value."""
        args, kwargs = tree_unflatten(self._real(leaves), structure)
        return func(*args, **kwargs)

    def _real(self, leaves: list[Any]) -> list[Any]:
        deferred = [leaf for leaf in leaves if isinstance(leaf, Tensor) and self.knows(leaf)]
        values = iter(self.values(deferred))
        return [next(values) if isinstance(leaf, Tensor) and self.knows(leaf) else leaf for leaf in leaves]

    def _drawn(self, func: Any, leaves: list[Any], structure: Any, written: list[Tensor], device: torch.device) -> _Draw:
        """Draw random numbers into scratch memory, so that the next draw gets the next ones."""
        generator = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None) or _generator(device)
        draw = _Draw(generator, generator.get_state())
        nowhere = {id(tensor): self._unused(tensor, device) for tensor in written}
        others = self._real([None if id(leaf) in nowhere else leaf for leaf in leaves])
        args, kwargs = tree_unflatten([nowhere.get(id(leaf), other) for leaf, other in zip(leaves, others)], structure)
        with torch.no_grad():
            func(*args, **kwargs)
        return draw

    def _unused(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Scratch memory in the shape of a tensor, shared by all draws: an allocator may keep what each of them would free."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride())) if tensor.numel() else 0
        if self._nowhere.device != device or len(self._nowhere) < extent * tensor.itemsize:
            self._nowhere = torch.empty(extent * tensor.itemsize, dtype=torch.uint8, device=device)
        flat = self._nowhere[: extent * tensor.itemsize].view(tensor.dtype)
        return flat.as_strided(tensor.size(), tensor.stride())

    def _held(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not self.knows(leaf):
            return leaf.detach().clone()  # the caller may modify it later
        return _View(_place(leaf), leaf.dtype, leaf.size(), leaf.stride(), int(leaf.storage_offset()))

    @torch.no_grad()
    def values(self, wanted: Iterable[Tensor]) -> list[Tensor]:
        """Materialise tensors. Those that share memory in the build share it in the result. Generators keep their states.

        Args:
            wanted: tensors of this build.
        """
        views = [self._held(tensor) for tensor in wanted]
        kept = {view.storage for view in views}
        memory = dict[int, torch.UntypedStorage]()
        needed = self._needed(kept)
        last = {place: index for index, operation in needed for place in (*operation.reads, *operation.makes) if place is not None}
        for index, operation in needed:
            args, kwargs = tree_unflatten([_seen(leaf, memory) for leaf in operation.leaves], operation.structure)
            results = _redrawn(operation.draw, operation.function, args, kwargs)
            made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
            memory |= {place: tensor.untyped_storage() for place, tensor in zip(operation.makes, made) if place is not None}
            del args, kwargs, results, made
            for place in {*operation.reads, *operation.makes} - kept:
                if place is not None and last[place] == index:
                    memory.pop(place, None)
        return [_seen(view, memory) for view in views]

    def _needed(self, wanted: set[int]) -> list[tuple[int, _Operation]]:
        """The operations to replay for the values of these storages, in order."""
        live = set(wanted)
        needed = []
        for index, operation in reversed(list(enumerate(self._operations))):
            if live & operation.writes or live.intersection(operation.makes):
                live |= operation.reads
                needed.append((index, operation))
        return needed[::-1]


class _Copies(TorchFunctionMode):
    """Makes ``copy.deepcopy`` of a tensor an operation that can be recorded; torch's own copies the memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, tensor.requires_grad)
            memo[id(tensor)] = copied
        return memo[id(tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _seen(leaf: Any, memory: dict[int, torch.UntypedStorage]) -> Any:
    if not isinstance(leaf, _View):
        return leaf
    storage = memory[leaf.storage]
    return torch.empty(0, dtype=leaf.dtype, device=storage.device).set_(storage, leaf.offset, leaf.size, leaf.stride)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensor arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    by_name = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    changed = [by_name.get(argument.name) for argument in func._schema.arguments if argument.is_write]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _generator(device: torch.device) -> torch.Generator:
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device.type)
    generators = getattr(module, "default_generators", None)
    if generators is None:
        return torch.default_generator
    return generators[module.current_device() if device.index is None else device.index]


def _redrawn(draw: _Draw | None, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if draw is None:
        return function(*args, **kwargs)
    now = draw.generator.get_state()
    draw.generator.set_state(draw.state)
    try:
        return function(*args, **kwargs)
    finally:
        draw.generator.set_state(now)
