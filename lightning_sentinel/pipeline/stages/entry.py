"""Finds the module whose call in a step runs the pipeline: the entry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_sentinel.errors import PipelineModelError

__all__ = ["find_entry", "uncompiled"]


def find_entry(module: nn.Module, layers: Sequence[nn.Module], named: str | None = None) -> nn.Module:
    """Find the entry: the innermost module that contains all layers and has a ``forward``.

    Args:
        module: the user's module.
        layers: of the pipeline.
        named: name of the entry, which skips the search; ``""`` is the module itself.

    Raises:
        PipelineModelError: if the named module does not contain all layers, or the search finds several modules.

    Example:
        >>> net = nn.Module()
        >>> net.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> find_entry(net, list(net.model)) is net.model
        True
    """
    wanted = {id(layer) for layer in layers}
    inside = {id(part) for layer in layers for part in layer.modules()} - (wanted if len(wanted) == 1 else set())
    holding: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if id(part) not in inside and _has_forward(part) and wanted <= {id(child) for child in part.modules()}:
            holding[name] = part
    if named is not None:
        return _of_name(module, named, holding)
    # If one candidate is inside another, the inner one is the entry, because the outer one calls it.
    outer = {id(part) for part in holding.values() for other in holding.values() if other is not part and _has(part, other)}
    found = {name: part for name, part in holding.items() if id(part) not in outer}
    if len(found) > 1:
        raise PipelineModelError(
            f"{type(module).__name__} has its pipeline's layers in {' and '.join(found)}, so it is not clear whose call runs the"
            f" pipeline. Name it: SentinelStrategy(sequential={next(iter(found))!r})."
        )
    return _as_called(module, next(iter(found.values()), module))


def uncompiled(part: nn.Module) -> nn.Module:
    """The original module behind the result of ``torch.compile``; any other module itself."""
    return part._orig_mod if isinstance(part, OptimizedModule) else part


def _of_name(module: nn.Module, name: str, holding: dict[str, nn.Module]) -> nn.Module:
    try:
        entry = module.get_submodule(name)
    except AttributeError:
        entry = None
    if entry is None or not any(part is uncompiled(entry) for part in holding.values()):
        raise PipelineModelError(
            f"sequential={name!r} names no module of {type(module).__name__} that has a forward() and all layers that"
            f" configure_pipeline returned; that do {sorted(holding)}, where '' is the LightningModule itself."
        )
    return _as_called(module, entry)


def _has_forward(part: nn.Module) -> bool:
    return type(part).forward is not nn.Module.forward


def _has(part: nn.Module, other: nn.Module) -> bool:
    return any(child is other for child in part.modules())


def _as_called(module: nn.Module, entry: nn.Module) -> nn.Module:
    """The module that steps call: for a compiled entry, the result of ``torch.compile``."""
    return next((part for part in module.modules() if uncompiled(part) is entry), entry)
