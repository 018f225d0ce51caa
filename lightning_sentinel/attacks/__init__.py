"""Simulated adversaries: what a malicious, lazy or broken worker sends in place of an honest signal."""

from __future__ import annotations

from lightning_sentinel.attacks.adversary import Adversary
from lightning_sentinel.attacks.context import Attack, AttackContext
from lightning_sentinel.attacks.delay import Delay
from lightning_sentinel.attacks.library import Bias, InvisibleNoise, Ones, RandomSign, RandomValue, Scale, Zeros
from lightning_sentinel.attacks.registry import AttackSpec, available, get, resolve

__all__ = [
    "Adversary",
    "Attack",
    "AttackContext",
    "AttackSpec",
    "Bias",
    "Delay",
    "InvisibleNoise",
    "Ones",
    "RandomSign",
    "RandomValue",
    "Scale",
    "Zeros",
    "available",
    "get",
    "resolve",
]
