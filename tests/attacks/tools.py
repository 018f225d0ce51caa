"""Signals and contexts for the tests of attacks."""

from __future__ import annotations

import torch

from lightning_sentinel.attacks import AttackContext
from lightning_sentinel.mesh import Direction, Worker

SHAPES = [(4, 6), (2, 5, 6), (2, 6, 3, 3)]
WORKER = Worker(1, 0)


def context(step=0, micro_batch=0, worker=WORKER, direction=Direction.ACTIVATION, seed=0, received=None, start_step=0):
    return AttackContext.seeded(
        seed, worker, direction, step=step, micro_batch=micro_batch, received=received, start_step=start_step
    )


def signal_of(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).add(1).to(dtype)


def by_channel(signal):
    """``(positions, C)`` as a NumPy array."""
    return signal.movedim(1 if signal.ndim == 4 else -1, -1).reshape(-1, 6).double().numpy()
