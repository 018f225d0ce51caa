from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from lightning_sentinel.mesh import Direction
from tests.verification.rigs import WARMUP, Rig


@pytest.fixture(scope="module")
def rigs() -> Callable[[Direction, str], Rig]:
    """Rigs after their warm-up; each call gives a copy."""
    known: dict[tuple[Direction, str], Rig] = {}

    def rig(direction: Direction = Direction.ACTIVATION, method: str = "sentinel") -> Rig:
        if (direction, method) not in known:
            known[direction, method] = Rig(direction, method=method)
            known[direction, method].run(WARMUP + 5)
        original = known[direction, method]
        twin = copy.copy(original)
        twin.verifier, twin.window = copy.deepcopy(original.verifier), copy.deepcopy(original.window)
        twin.stream = copy.copy(original.stream)
        twin.stream.generator = torch.Generator().manual_seed(17)
        return twin

    return rig
