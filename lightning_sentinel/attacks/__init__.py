"""Simulated adversaries: what a malicious, lazy or broken worker sends in place of an honest signal."""

from __future__ import annotations

from lightning_sentinel.attacks.adversary import Adversary
from lightning_sentinel.attacks.context import Attack, AttackContext
from lightning_sentinel.attacks.delay import Delay
from lightning_sentinel.attacks.faults import BadRows, GradientContribution, NonFinite, Site
from lightning_sentinel.attacks.imitation import MomentumNoise, Surrogate
from lightning_sentinel.attacks.library import Bias, InvisibleNoise, Ones, RandomSign, RandomValue, Scale, Zeros
from lightning_sentinel.attacks.misplaced import Permute, Swap
from lightning_sentinel.attacks.product_faults import BitFlip, MisplacedTile, SilentCorruption, StuckTile, WrongAddress
from lightning_sentinel.attacks.products import Phase, Product
from lightning_sentinel.attacks.registry import AttackSpec, available, get, resolve
from lightning_sentinel.attacks.roles import Equivocate, FalseNotes, FalseRows, FalseVotes
from lightning_sentinel.attacks.shortcut import FlipResidual, Identity, ReceivedNoise
from lightning_sentinel.attacks.stage_weights import GradientSteering, OwnWeights, TaskVectors
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
    "BitFlip",
    "Collude",
    "Delay",
    "Drift",
    "Equivocate",
    "FalseNotes",
    "FalseRows",
    "FalseVotes",
    "FlipResidual",
    "Frame",
    "GradientContribution",
    "GradientSteering",
    "Identity",
    "Intermittent",
    "InvisibleNoise",
    "Local",
    "MisplacedTile",
    "MomentumNoise",
    "NonFinite",
    "Ones",
    "OwnWeights",
    "Permute",
    "Phase",
    "Product",
    "RandomSign",
    "RandomValue",
    "ReceivedNoise",
    "Scale",
    "Several",
    "SilentCorruption",
    "Site",
    "StuckTile",
    "Surrogate",
    "Swap",
    "TaskVectors",
    "WrongAddress",
    "Zeros",
    "available",
    "get",
    "resolve",
]
