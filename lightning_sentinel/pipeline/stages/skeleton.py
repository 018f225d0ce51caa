"""Replaces the layers of other stages by placeholders that take no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.stages.materialise import like, own_tensors, replace_tensors

__all__ = ["ForeignLayer", "Skeleton"]


class ForeignLayer(nn.Module):
    """Placeholder for a layer that another process has. It has no parameters, and cannot be called.

    Args:
        name: of the layer.

    Example:
        >>> ForeignLayer("net.2")
        ForeignLayer(net.2)
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._layer = name

    def forward(self, *_: Any, **__: Any) -> Any:
        raise PipelineModelError(
            f"The layer {self._layer} was called by itself, but it is on another stage, in another process. Inside a step call the"
            " pipeline as a whole and once, not its parts, such as an encoder and a decoder, apart. Outside of steps use a copy:"
            " Model.load_from_checkpoint(path)."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"The layer {vars(self).get('_layer')} is on another stage, in another process, so {name!r} of it cannot be looked"
                " at here, except in configure_optimizers."
            ) from None

    def extra_repr(self) -> str:
        return self._layer


class _Place(NamedTuple):
    """A layer that was taken out, and where."""

    owner: nn.Module
    name: str
    layer: nn.Module


class Skeleton:
    """The layers that were taken out of a module, without their memory.

    Code that expects the whole module, such as ``configure_optimizers``, runs while the layers are put back. Their tensors have
    their shapes and dtypes, but are zeros that share one element of memory.

    Args:
        module: whose layers are taken out.
        device: where the placeholder tensors are.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> skeleton = Skeleton(net, torch.device("cpu"))
        >>> skeleton.take_out("1")
        >>> skeleton.let_go()
        >>> with skeleton.put_back():
        ...     optimizer = torch.optim.SGD(net[1].parameters(), lr=0.1)
        >>> skeleton.leave(optimizer)
        >>> len(list(net.parameters())), optimizer.param_groups[0]["params"]
        (2, [])
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._places: list[_Place] = []
        self._stand_ins: dict[int, nn.Parameter | Tensor] = {}

    def take_out(self, name: str) -> None:
        """Take out the layer ``name``, unless it is part of a layer that is out already."""
        path, _, last = name.rpartition(".")
        try:
            owner = self._module.get_submodule(path)
        except AttributeError:
            return
        layer = owner._modules.get(last)
        if layer is not None and not isinstance(layer, ForeignLayer):
            self._places.append(_Place(owner, last, layer))
            owner._modules[last] = ForeignLayer(name)

    def modules(self) -> list[nn.Module]:
        """All submodules of the layers that were taken out."""
        return [part for place in self._places for part in place.layer.modules()]

    def let_go(self) -> None:
        """Free the memory of the layers that were taken out, except tensors that other layers of the module share."""
        kept = {id(tensor) for part in self._module.modules() for _, tensor in own_tensors(part)}
        parts = {id(part): part for part in self.modules()}
        present = {id(part) for part in self._module.modules()}
        stand_ins: dict[int, Tensor] = {}
        for part in (part for key, part in parts.items() if key not in present):
            for _, tensor in own_tensors(part):
                if id(tensor) not in kept and id(tensor) not in stand_ins:
                    stand_ins[id(tensor)] = self._stand_in(tensor)
            replace_tensors(part, lambda leaf: stand_ins.get(id(leaf), leaf))
        self._stand_ins |= {id(tensor): tensor for tensor in stand_ins.values()}

    def _stand_in(self, tensor: Tensor) -> Tensor:
        return like(tensor, torch.zeros((), dtype=tensor.dtype, device=self._device).expand(tensor.shape))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """A context in which the module has all of its layers."""
        out = [place.owner._modules[place.name] for place in self._places]
        for owner, name, layer in self._places:
            owner._modules[name] = layer
        try:
            yield
        finally:
            for (owner, name, _), stand_in in zip(self._places, out):
                owner._modules[name] = stand_in

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove other stages' parameters from an optimizer of the whole module. Its parameter groups stay, even empty ones."""
        for group in optimizer.param_groups:
            mine = [id(parameter) not in self._stand_ins for parameter in group["params"]]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [entry for entry, is_mine in zip(group[key], mine) if is_mine]
        for parameter in [one for one in optimizer.state if id(one) in self._stand_ins]:
            del optimizer.state[parameter]
