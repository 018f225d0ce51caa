"""Simulated adversaries: what a malicious, lazy or broken worker sends in place of an honest signal."""

from __future__ import annotations

from lightning_sentinel.attacks.adversary import Adversary
from lightning_sentinel.attacks.context import Attack, AttackContext
from lightning_sentinel.attacks.delay import Delay
from lightning_sentinel.attacks.faults import BadRows, FlippedBits, GradientContribution, NonFinite, Site
from lightning_sentinel.attacks.imitation import MomentumNoise, Surrogate
from lightning_sentinel.attacks.library import Bias, InvisibleNoise, Ones, RandomSign, RandomValue, Scale, Zeros
from lightning_sentinel.attacks.misplaced import Permute, Swap
from lightning_sentinel.attacks.registry import AttackSpec, available, get, resolve
from lightning_sentinel.attacks.roles import FalseNotes, FalseRows, FalseVotes
from lightning_sentinel.attacks.shortcut import FlipResidual, Identity, ReceivedNoise
from lightning_sentinel.attacks.subtle import AddNoise, Drift, Frame, Local
from lightning_sentinel.attacks.wrappers import Collude, Intermittent, Several

__all__ = [
    "AddNoise",
    "Adversary",
    "Attack",
    "AttackContext",
    "AttackSpec",
    "BadRows",
    "Bias",
    "Collude",
    "Delay",
    "Drift",
    "FalseNotes",
    "FalseRows",
    "FalseVotes",
    "FlipResidual",
    "FlippedBits",
    "Frame",
    "GradientContribution",
    "Identity",
    "Intermittent",
    "InvisibleNoise",
    "Local",
    "MomentumNoise",
    "NonFinite",
    "Ones",
    "Permute",
    "RandomSign",
    "RandomValue",
    "ReceivedNoise",
    "Scale",
    "Several",
    "Site",
    "Surrogate",
    "Swap",
    "Zeros",
    "available",
    "get",
    "resolve",
]
