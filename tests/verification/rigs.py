"""A boundary, its verifier, and honest signals to warm it up with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification import COLUMNS, BoundaryVerifier
from lightning_sentinel.verification.features import FEATURES, watched
from lightning_sentinel.verification.projection import Projection, SecretDirections
from lightning_sentinel.verification.window import FenceRule, FenceWindow

SAMPLES, POSITIONS, CHANNELS = 4, 6, 8
REPLICAS, MICRO_BATCHES = 4, 2
WARMUP = 50
YES, NO = torch.tensor([True]), torch.tensor([False])
NOBODY = torch.zeros(REPLICAS, dtype=torch.bool)
SCORE, WORST, FLAGGED, TAINTED, LENGTH = (COLUMNS.index(name) for name in ("score", "worst", "flagged", "tainted", "positions"))


class Honest:
    """Gaussian samples around a mean that drifts; activations have a strong mean, gradients are mostly noise."""

    def __init__(self, direction: Direction, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        strength = 2.0 if direction is Direction.ACTIVATION else 0.02
        self.mean = self.noise(POSITIONS, CHANNELS) * strength

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def drift(self) -> None:
        self.mean = self.mean + 0.01 * self.noise(POSITIONS, CHANNELS)

    def signal(self) -> Tensor:
        return self.mean + self.noise(SAMPLES, POSITIONS, CHANNELS)


def known_of(verifier: BoundaryVerifier, received: Tensor) -> Projection:
    """What its neighbours tell a verifier of what a sender had received."""
    return SecretDirections(verifier.boundary, Verification(), received.device).project(received)


class Rig:
    """A verifier with the fences of a calibration that sees the same honest stream."""

    def __init__(
        self, direction: Direction = Direction.ACTIVATION, seed: int = 0, with_input: bool = False, **settings: Any
    ) -> None:
        config = Verification(**{"warmup_steps": WARMUP, **settings})
        # Of a mesh with a stage before and one behind, so that its senders have received something.
        self.verifier = BoundaryVerifier(Boundary(1 if direction is Direction.ACTIVATION else 0, direction), config)
        self.window = FenceWindow(
            1, config.window, FenceRule(watched(config), config.false_positive_rate, config.method == "sentinel")
        )
        self.stream, self.with_input, self.warmup, self.steps = Honest(direction, seed), with_input, config.warmup_steps, 0

    @property
    def warmed_up(self) -> bool:
        return self.steps >= self.warmup

    def received(self, signal: Tensor) -> Projection | None:
        """What the sender of an honest signal had received: the signal is a little more than that."""
        return known_of(self.verifier, 0.9 * signal) if self.with_input else None

    def step(self, others: Callable[[BoundaryVerifier], None] | None = None) -> Tensor:
        """One step, in which all replicas are honest; returns the rows ``(replicas * micro_batches, len(COLUMNS))``."""
        self.stream.drift()
        signals = [torch.cat([self.stream.signal() for _ in range(REPLICAS)]) for _ in range(MICRO_BATCHES)]
        rows = torch.cat([self.verifier.inspect(signal, NOBODY, self.received(signal)).rows for signal in signals])
        if others is not None:
            others(self.verifier)
        self.verifier.learn(self.verifier.contribution(~NOBODY, NOBODY))
        if self.steps >= min(10, self.warmup // 2):
            self.window.add(rows[None, :, : len(FEATURES)], ~rows[None, :, FLAGGED].bool())
        self.steps += 1
        if self.warmed_up:
            self.window.fit()
            self.verifier.fences = self.window.fences.of(0)
        return rows

    def run(self, steps: int) -> Tensor:
        rows = torch.empty(steps, REPLICAS * MICRO_BATCHES, len(COLUMNS))
        for step in range(steps):
            rows[step] = self.step()
        return rows

    def score(self, signal: Tensor) -> float:
        """Of a signal that leaves no trace."""
        return copy.deepcopy(self.verifier).inspect(signal, NO).rows[0, SCORE].item()


def inspect_one(verifier: BoundaryVerifier, sender: int, signal: Tensor, tainted: Tensor = NO) -> tuple[Tensor, Tensor]:
    """What is said of one sender's signal in a micro-batch in which those of all others are tainted: its row, its verdict."""
    signals, taints = torch.zeros(REPLICAS, *signal.shape), torch.ones(REPLICAS, dtype=torch.bool)
    signals[sender], taints[sender] = signal, tainted
    rows, flagged = verifier.inspect(signals.flatten(0, 1), taints)
    assert not flagged[taints].any()
    return rows[sender], flagged[sender]
