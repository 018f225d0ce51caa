"""Callbacks: what a run shows, and what is done to it on purpose."""

from lightning_sentinel.callbacks.attack_injector import AttackInjector
from lightning_sentinel.callbacks.monitor import SentinelMonitor

__all__ = ["AttackInjector", "SentinelMonitor"]
