"""Finds the list of layers in a LightningModule that the pipeline is cut from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from torch import nn

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.stages.entry import find_entry, uncompiled
from lightning_sentinel.pipeline.stages.skeleton import Skeleton
from lightning_sentinel.pipeline.stages.specs import build_specs

__all__ = ["PipelineLayers", "find_layers"]


@dataclass(frozen=True)
class PipelineLayers:
    """The layers of a module, in order.

    Args:
        module: the user's module.
        entry: the module whose ``forward`` runs the layers: an ``nn.Sequential``, a network, or ``module`` itself; ``None`` if
            nothing is cut, and steps may call any part of the module.
        layers: the layers.
        names: dotted name of each layer in ``module``, as in its ``state_dict``.
    """

    module: L.LightningModule
    entry: nn.Module | None
    layers: tuple[nn.Module, ...]
    names: tuple[str, ...]

    @property
    def parameter_names(self) -> list[str]:
        """Names of all parameters of the unsplit module, in its own order; valid until :meth:`keep_only`."""
        return [name for name, _ in self.module.named_parameters()]

    @property
    def state_names(self) -> list[str]:
        """Keys of the unsplit module's ``state_dict``; valid until :meth:`keep_only`."""
        return list(self.module.state_dict())

    def keep_only(self, start: int, stop: int, device: torch.device) -> Skeleton:
        """Take out the layers outside ``[start, stop)``, which other stages own. The keys of the other layers do not change.

        The module's other names for these layers are removed too, or this stage would still hold, step and save their parameters.

        Args:
            start: number of the first layer to keep.
            stop: one more than the number of the last layer to keep.
            device: where this process computes.

        Returns:
            the layers that were taken out.
        """
        skeleton = Skeleton(self.module, device)
        owned = {id(part) for layer in self.layers[start:stop] for part in layer.modules()}
        for index, (name, layer) in enumerate(zip(self.names, self.layers)):
            if start <= index < stop:
                continue
            gone = {id(part) for part in layer.modules()} - owned
            aliases = [alias for alias, part in self.module.named_modules(remove_duplicate=False) if id(part) in gone]
            for alias in (name, *aliases):
                if not any(alias.startswith(f"{kept}.") or alias == kept for kept in self.names[start:stop]):
                    skeleton.take_out(alias)
        skeleton.let_go()
        return skeleton


def find_layers(
    module: L.LightningModule,
    sequential: str | None = None,
    building: AbstractContextManager[Any] | None = None,
    whole: bool = False,
) -> PipelineLayers:
    """Find the layers to cut into stages.

    In this order: the layers that ``configure_pipeline`` returns; the attribute that ``sequential`` names; the only
    ``nn.Sequential`` among the module's attributes.

    Args:
        module: the user's module.
        sequential: the ``nn.Sequential`` attribute to cut, if there are several; with ``configure_pipeline``, the entry.
        building: a context entered while layers are built from DeepSpeed's ``LayerSpec``.
        whole: whether this process has the only stage. Then the whole module is one layer if its layers are not found, or if it has
            trainable parameters outside of them.

    Raises:
        PipelineModelError: if no layers are found, or several candidates, or there are trainable parameters outside the layers.

    Example:
        >>> import lightning as L
        >>> from torch import nn
        >>> class Regression(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> find_layers(Regression()).names
        ('net.0', 'net.1', 'net.2')
    """
    hooked = hasattr(module, "configure_pipeline")
    if whole and not hooked and sequential is None and len(_sequentials(module)) != 1:
        return PipelineLayers(module, None, (module,), ("",))
    found = _from_hook(module, sequential, building or nullcontext()) if hooked else _from_sequential(module, sequential)
    if whole and _outside(found):
        return PipelineLayers(module, None, (module,), ("",))
    _check_parameters(found)
    return found


def _from_hook(module: L.LightningModule, entry: str | None, building: AbstractContextManager[Any]) -> PipelineLayers:
    hook: Callable[[], Any] = module.configure_pipeline  # type: ignore[assignment]
    layers = hook()
    where = f"{type(module).__name__}.configure_pipeline"
    if not isinstance(layers, Iterable) or isinstance(layers, (str, dict)):
        raise PipelineModelError(f"{where} returned {type(layers).__name__}; it must return a list of nn.Module, in order.")
    layers = build_specs(module, tuple(layers), building)
    names_of = {id(child): name for name, child in module.named_modules()}
    names = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise PipelineModelError(
                f"{where} returned {type(layer).__name__} at position {index}; every layer must be an nn.Module that is an"
                " attribute of the LightningModule, or a LayerSpec."
            )
        if id(layer) not in names_of:
            raise PipelineModelError(
                f"{where} returned at position {index} a {type(layer).__name__} that is no attribute of the LightningModule, so it"
                " would be missing from checkpoints. Assign it in __init__ and return it from there."
            )
        names.append(names_of[id(layer)])
    repeated = sorted(
        {name for name, layer in zip(names, layers) if names.count(name) > 1 and any(True for _ in layer.parameters())}
    )
    if repeated:
        raise PipelineModelError(f"{where} returned {repeated} more than once; layers that share weights must be one layer.")
    return PipelineLayers(module, find_entry(module, layers, entry), layers, tuple(names))


def _sequentials(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if isinstance(uncompiled(child), nn.Sequential)}


def _from_sequential(module: L.LightningModule, sequential: str | None) -> PipelineLayers:
    candidates = _sequentials(module)
    kind = type(module).__name__
    if sequential is not None:
        try:
            entry = module.get_submodule(sequential)
        except AttributeError:
            entry = None
        if entry is None or not isinstance(uncompiled(entry), nn.Sequential):
            raise PipelineModelError(
                f"sequential={sequential!r} names no nn.Sequential of {kind}; it has {sorted(candidates) or 'none at top level'}."
            )
    elif len(candidates) != 1:
        what = f"has {len(candidates)} nn.Sequential attributes ({', '.join(candidates)})" if candidates else "has no nn.Sequential"
        remedy = (
            "Name the one to cut: SentinelStrategy(sequential=...)."
            if candidates
            else "Put its layers into one nn.Sequential attribute, or define configure_pipeline(self) that returns them as a list."
        )
        raise PipelineModelError(f"{kind} {what}, so it is not clear where to cut it into stages. {remedy}")
    else:
        sequential, entry = next(iter(candidates.items()))
    # Not children(), which skips a layer that occurs a second time, such as an activation module used twice.
    sequence = cast(nn.Sequential, uncompiled(entry))
    path = sequential if sequence is entry else f"{sequential}._orig_mod"
    return PipelineLayers(module, entry, tuple(sequence), tuple(f"{path}.{name}" for name in sequence._modules))


def _check_parameters(found: PipelineLayers) -> None:
    owners: defaultdict[int, set[str]] = defaultdict(set)
    for name, layer in zip(found.names, found.layers):
        for part in layer.modules():
            if any(True for _ in part.parameters(recurse=False)):
                owners[id(part)].add(name)
    shared = sorted({name for names in owners.values() if len(names) > 1 for name in names}) or _repeated(found)
    if shared:
        raise PipelineModelError(
            f"The layers {_some(shared)} share parameters by sharing a module. Layers of different stages live in different"
            " processes and cannot: give each a module of its own and tie their weights (`head.weight = embedding.weight`), or make"
            " them one layer."
        )
    if outside := _outside(found):
        raise PipelineModelError(
            f"{type(found.module).__name__} has trainable parameters outside its pipeline: {_some(outside)}. No stage would own"
            " them. Move them into the layers, or freeze them with requires_grad_(False)."
        )


def _outside(found: PipelineLayers) -> list[str]:
    """Names of trainable parameters outside of all layers."""
    inside = {id(parameter) for layer in found.layers for parameter in layer.parameters()}
    return [name for name, p in found.module.named_parameters() if p.requires_grad and id(p) not in inside]


def _repeated(found: PipelineLayers) -> list[str]:
    places = [id(layer) for layer in found.layers]
    trained = zip(found.names, found.layers)
    return [name for name, layer in trained if places.count(id(layer)) > 1 and any(True for _ in layer.parameters())]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
