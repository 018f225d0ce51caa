"""``pytorch_lightning`` is another package than ``lightning``, with classes of its own: said plainly instead of failing oddly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from lightning_sentinel.errors import ConfigurationError

__all__ = ["register_refusals"]


def register_refusals(names: Iterable[str]) -> None:
    """Let ``pytorch_lightning.Trainer(strategy=name)`` explain why it cannot work."""
    from pytorch_lightning.strategies import StrategyRegistry

    for name in names:
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, _refuse, description="for the package lightning only")


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ConfigurationError(
        "lightning_sentinel is a plugin of the package `lightning`, but this Trainer comes from `pytorch_lightning`, whose classes"
        " are different ones. Replace `import pytorch_lightning as pl` by `import lightning as L`, for the Trainer and for every"
        " module."
    )
