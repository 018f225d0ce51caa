"""Which call in a step is the call of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_sentinel.errors import PipelineModelError

__all__ = ["find_entry", "uncompiled"]


def find_entry(module: nn.Module, layers: Sequence[nn.Module], named: str | None = None) -> nn.Module:
    """The module whose ``forward`` the layers make up: the smallest that has all of them, and a ``forward``.

    Args:
        module: the user's module.
        layers: of the pipeline.
        named: where the entry is, if it is not to be looked for; ``""`` is the module itself.

    Raises:
        PipelineModelError: if the one that is named has not all of the layers, or several have.

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
    # Of a module and one inside it the inner one is it: the outer calls it.
    outer = {id(part) for part in holding.values() for other in holding.values() if other is not part and _has(part, other)}
    found = {name: part for name, part in holding.items() if id(part) not in outer}
    if len(found) > 1:
        raise PipelineModelError(
            f"{type(module).__name__} has its pipeline's layers in {' and '.join(found)}, so it is not clear whose call runs the"
            f" pipeline. Name it: SentinelStrategy(sequential={next(iter(found))!r})."
        )
    return _as_called(module, next(iter(found.values()), module))


def uncompiled(part: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given, if a module is what it returned."""
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
    """The module that steps call: of one that is compiled what ``torch.compile`` returned."""
    return next((part for part in module.modules() if uncompiled(part) is entry), entry)
