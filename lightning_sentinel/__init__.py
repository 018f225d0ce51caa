"""Verified pipeline parallelism for PyTorch Lightning.

Importing the package registers the strategies ``sentinel``, ``sentinel_monitor`` and ``sentinel_virtual``.
"""

from typing import Any

from lightning_sentinel import compat

compat.require_versions()

from lightning.pytorch.strategies import StrategyRegistry

from lightning_sentinel import attacks, metrics
from lightning_sentinel.attacks import AttackContext
from lightning_sentinel.callbacks import AttackInjector, SentinelMonitor
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import SentinelError
from lightning_sentinel.mesh import Direction, Worker
from lightning_sentinel.strategy import SentinelStrategy
from lightning_sentinel.verification import Detection, Ledger

__version__ = "0.1.0.dev0"

__all__ = [
    "AttackContext",
    "AttackInjector",
    "Detection",
    "Direction",
    "Ledger",
    "Response",
    "SentinelError",
    "SentinelMonitor",
    "SentinelStrategy",
    "Verification",
    "Worker",
    "attacks",
    "metrics",
]

_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sentinel": ("verified pipeline: detects, excludes and bans", {}),
    "sentinel_virtual": ("verified pipeline with the whole mesh in one process", {"engine": "virtual"}),
    "sentinel_monitor": (
        "verified pipeline that only reports",
        {"response": Response(on_flag="log", ban_after=None)},
    ),
}


def _register() -> None:
    for name, (description, arguments) in _PRESETS.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, SentinelStrategy, description=description, **arguments)
    compat.register_refusals(_PRESETS)


_register()
