"""Materialises the tensors of a module that was built without values: only those of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.stages.deferred import DeferredBuild

__all__ = ["like", "materialise", "own_tensors", "replace_tensors", "reset_meta_layers", "without_values"]


def without_values(module: nn.Module) -> bool:
    """Whether a module has a tensor without a value."""
    return any(_is_empty(tensor) for _, tensor in _tensors(module))


def reset_meta_layers(layers: Sequence[nn.Module], names: Sequence[str], build: DeferredBuild, device: torch.device) -> None:
    """Record how ``reset_parameters`` of each submodule initialises layers that were built under ``torch.device("meta")``.

    The submodules of all stages are reset layer by layer, so that their values do not depend on where the model is cut.

    Args:
        layers: all layers, in order.
        names: of the layers, for errors.
        build: records the initialisation.
        device: where the values will be.

    Raises:
        PipelineModelError: if a submodule has parameters or buffers that it cannot reset.
    """
    planned: dict[int, Tensor] = {}
    for name, layer in zip(names, layers):
        for path, part in _inside_out(layer, name):
            mine = {key: tensor for key, tensor in own_tensors(part) if tensor.is_meta and not isinstance(tensor, FakeTensor)}
            if not mine:
                continue
            with build:
                for tensor in mine.values():
                    if id(tensor) not in planned:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        planned[id(tensor)] = like(tensor, empty)
                replace_tensors(part, lambda leaf: planned.get(id(leaf), leaf))
                reset: Callable[[], Any] | None = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
                if reset is not None:
                    reset()
            left = [key for key, tensor in own_tensors(part) if build.knows(tensor) and not build.has_value(tensor)]
            if left:
                what = "has no reset_parameters()" if reset is None else "does not give it a value in reset_parameters()"
                raise PipelineModelError(
                    f"{path}.{left[0]} was built on the meta device, and {type(part).__name__} {what}. Build the layers in"
                    " configure_model(self) without torch.device('meta'), which defers any module, or define reset_parameters()."
                )


def materialise(module: nn.Module, build: DeferredBuild, others: Iterable[nn.Module] = ()) -> None:
    """Materialise a module's tensors that have no values.

    Args:
        module: the part of the module that this process keeps; shared parameters stay shared.
        build: in which the tensors were made.
        others: modules that share tensors with ``module``; the tensors are replaced there too.

    Raises:
        PipelineModelError: if a tensor was not made in ``build``.
    """
    found: dict[int, tuple[str, Tensor]] = {id(tensor): (name, tensor) for name, tensor in _tensors(module) if _is_empty(tensor)}
    for name, tensor in found.values():
        if not build.knows(tensor):
            raise PipelineModelError(
                f"{type(module).__name__}.{name} has no value: it is no part of the pipeline's layers, and was built on the meta"
                " device. Build it in __init__ without torch.device('meta'), or in configure_model(self)."
            )
    tensors = [tensor for _, tensor in found.values()]
    values = {id(tensor): like(tensor, value) for tensor, value in zip(tensors, build.values(tensors))}
    for part in (*module.modules(), *others):
        replace_tensors(part, lambda leaf: values.get(id(leaf), leaf))


def _is_empty(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value as the same kind as a tensor: a parameter with the tensor's attributes, or a plain tensor."""
    if not isinstance(tensor, nn.Parameter):
        return value
    parameter = nn.Parameter(value, tensor.requires_grad)
    # Attributes that the module's author has set on the parameter.
    vars(parameter).update({key: note for key, note in vars(tensor).items() if not hasattr(parameter, key)})
    return parameter


def own_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own tensors, without those of submodules: parameters, buffers, and tensors in other attributes."""
    for key, value in vars(part).items():
        entries = value.items() if key in ("_parameters", "_buffers") else [(key, value)] if key != "_modules" else []
        for name, entry in entries:
            if isinstance(entry, nn.Parameter) and is_lazy(entry):
                raise PipelineModelError(
                    f"The parameter {name} of {type(part).__name__} gets its shape in the first forward pass, but the model is cut"
                    " before that. Use the module that is told its shape, such as nn.Linear for nn.LazyLinear."
                )
            yield from ((name, leaf) for leaf in tree_leaves(entry) if isinstance(leaf, Tensor))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in module.named_modules():
        for name, tensor in own_tensors(part):
            yield f"{path}.{name}" if path else name, tensor


def replace_tensors(part: nn.Module, instead: Callable[[Any], Any]) -> None:
    """Replace a module's own tensors in its parameters, buffers and other attributes."""
    for key, value in vars(part).items():
        if key in ("_parameters", "_buffers"):
            value.update({name: instead(entry) for name, entry in value.items()})
        elif key != "_modules" and any(instead(leaf) is not leaf for leaf in tree_leaves(value)):
            vars(part)[key] = tree_map(instead, value)


def _inside_out(layer: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module's submodules before itself: the order in which constructors finish."""
    for child_name, child in layer.named_children():
        yield from _inside_out(child, f"{name}.{child_name}")
    yield name, layer
