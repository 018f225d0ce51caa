"""A device in pure Python: its tensors have their values on the host, and behave as those of a GPU in what a host can get wrong.

An operator that mixes them with tensors of the host raises, and each time the host waits for a value it is written down who asked.
It is made of torch's private and experimental ``_setup_privateuseone_for_python_backend``, which is touched here and nowhere else.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
_EXTENSION = 12
"""What DLPack calls a device that it does not know, and torch ``PrivateUse1``."""

_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lightning_sentinel"
_ON_BEHALF = str(PACKAGE / "pipeline/waiting.py")
"""What waits there is waited for by somebody else."""

# The place of the offset among the arguments of as_strided.
_OFFSET = 3
# Whose result, or its shape, the host has to know.
_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "item")
# Which torch would make of an empty tensor that is resized, which one of this device cannot be.
_MADE_BY_RESIZING = ("abs", "eye", "eye.m", "linspace")
# Between devices by their nature.
_COPIES = ("_copy_from", "_copy_from_and_resize", "copy_", "_to_copy", "set_")


class WrongDevice(RuntimeError):
    """An operator was given tensors of the host and of the device."""


def _holding(values: Tensor) -> Tensor:
    """A tensor of the device on the memory of one of the host, which its storage keeps.

    Handed over in the way of DLPack, with another word for the device: torch has no other for a tensor with strides of its own.
    """
    capsule = torch.utils.dlpack.to_dlpack(values)
    # A DLManagedTensor begins with a pointer to the memory, then the kind of the device.
    ctypes.c_int32.from_address(_address(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = _EXTENSION
    handle: Tensor = torch._C._from_dlpack(capsule)
    handle.untyped_storage().values = values
    return handle


def values_of(tensor: Tensor) -> Tensor:
    """The tensor of the host behind one of the device."""
    values: Tensor = tensor.untyped_storage().values  # type: ignore[attr-defined]
    if tensor.storage_offset() == 0 and values.shape == tensor.shape and values.stride() == tensor.stride():
        return values
    return values.as_strided(tensor.shape, tensor.stride(), values.storage_offset() + tensor.storage_offset())


class Reads:
    """Who made the host wait for the device: the line of the package that did, else of whoever called torch."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def clear(self) -> None:
        self.counts.clear()

    def note(self) -> None:
        # A thread beside the schedule may wait: the host goes on.
        if threading.current_thread() is threading.main_thread():
            self.counts[_caller()] += 1


reads = Reads()


def _caller() -> str:
    frame: Any = sys._getframe(2)
    first = None
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(PACKAGE)) and path != _ON_BEHALF:
            return f"{Path(path).relative_to(PACKAGE)}:{frame.f_code.co_name}"
        if first is None and "/torch/" not in path and not path.endswith("fakegpu/device.py"):
            first = f"{Path(path).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return first or "torch"


def _on_device(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == NAME


def _unwrapped(leaf: Any) -> Any:
    if _on_device(leaf):
        return values_of(leaf)
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operator on the device comes here."""
    name = operator._schema.name.split("::")[1]
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    mixed = any(map(_on_device, leaves)) and any(leaf.device.type == "cpu" and leaf.dim() > 0 for leaf in leaves)
    if mixed and name not in _COPIES:
        raise WrongDevice(f"{name}: {[(str(leaf.device), tuple(leaf.shape)) for leaf in leaves]}")
    if name == "_copy_from":
        source, target, under_way = (*args, False)[:3]
        # Of a copy that goes on by itself the host waits for nothing, until it waits for something that comes behind it.
        if not _on_device(target) and not kwargs.get("non_blocking", under_way):
            reads.note()
        _unwrapped(target).copy_(_unwrapped(source))
        return target
    indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
    if name in _READS or any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices):
        reads.note()
    args_there, kwargs_there = tree_map(_unwrapped, args), tree_map(_unwrapped, kwargs)
    if name == "as_strided" and len(args) > _OFFSET and args[_OFFSET] is not None:
        # Each tensor of the device begins where its memory does; the one behind it may be in the middle of another's.
        args_there = (*args_there[:_OFFSET], args_there[_OFFSET] + values_of(args[0]).storage_offset())
    with torch.inference_mode(False):
        result = operator(*args_there, **kwargs_there)
    declared = operator._schema.arguments
    written = [(args[place], args_there[place]) for place in range(len(args)) if declared[place].is_write]
    written += [(kwargs[one.name], kwargs_there[one.name]) for one in declared if one.is_write and one.name in kwargs]
    for handle, there in written:
        if _on_device(handle) and handle.shape != there.shape:
            raise NotImplementedError(f"{name} resizes its output, which a tensor of this device cannot be")
    returns = operator._schema.returns
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        return written[0][0] if len(returns) == 1 else tuple(handle for handle, _ in written)
    target = kwargs.get("device")
    here = any(map(_on_device, leaves)) if target is None else torch.device(target).type == NAME
    # A view is as much, or as little, of inference mode as what it is a view of.
    is_view = bool(returns) and returns[0].alias_info is not None
    with torch.inference_mode(leaves[0].is_inference() if is_view else torch.is_inference_mode_enabled()):
        return tree_map(lambda leaf: _holding(leaf) if here and isinstance(leaf, Tensor) else leaf, result)


class _Module:
    """``torch.fakegpu``, as far as torch and Lightning ask for it; the host draws its random numbers."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        assert torch.device(device).index in (None, 0), f"there is one device, and not {device}"

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_libraries: list[torch.library.Library] = []


def install() -> torch.device:
    """Make the device, once in a process. Returns it."""
    if not _libraries:
        torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        everything, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        everything.fallback(lambda operator, *args, **kwargs: _run(operator, *args, **kwargs), "PrivateUse1")
        for name in _MADE_BY_RESIZING:
            base, _, overload = name.partition(".")
            operators.impl(name, partial(_run, getattr(getattr(torch.ops.aten, base), overload or "default")), "PrivateUse1")
        _libraries.extend((everything, operators))
    return torch.device(NAME, 0)
