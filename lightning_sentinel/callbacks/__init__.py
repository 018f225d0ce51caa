"""Callbacks: one logs scores and detections, one makes chosen workers attack the run."""

from lightning_sentinel.callbacks.attack_injector import AttackInjector
from lightning_sentinel.callbacks.monitor import SentinelMonitor

__all__ = ["AttackInjector", "SentinelMonitor"]
