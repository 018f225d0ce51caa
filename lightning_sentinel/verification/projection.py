"""Secret random directions, and projections of signals on them.

A verifier projects what a sender received and what it sent on the same directions: a few dozen for each boundary, drawn from a seed
that workers must not know. A worker that knows them can send anything that looks right along them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.seeds import secret_seed
from lightning_sentinel.verification.axes import as_tokens, pieces

__all__ = ["PROJECTED", "Projection", "SecretDirections", "orthogonal_directions", "unit_directions"]

PROJECTED = 32
"""Floats per token of the projection that neighbours exchange."""


def unit_directions(channels: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Random unit vectors ``(C, K)``, equal on every device for a seed: drawn on the CPU, then moved.

    Example:
        >>> unit_directions(8, 3, seed=0).norm(dim=0)
        tensor([1.0000, 1.0000, 1.0000])
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(channels, count, generator=generator)
    return (directions / directions.norm(dim=0)).to(device)


def orthogonal_directions(channels: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Random orthogonal directions ``(C, min(C, K))``, of such a length that a projected vector keeps its length on average.

    Inner products survive (Johnson and Lindenstrauss 1984); orthogonal directions keep them better than independent ones.

    Example:
        >>> directions = orthogonal_directions(64, 16, seed=0)
        >>> (directions.T @ directions)[0, :2].round(decimals=4).abs()
        tensor([4., 0.])
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(channels, min(count, channels), generator=generator)).Q
    return (directions * (channels / directions.shape[1]) ** 0.5).to(device)


class Projection(NamedTuple):
    """A signal along secret directions.

    Args:
        values: ``(B, T, min(C, PROJECTED))``, float32.
        channels: C, of the signal.
    """

    values: Tensor
    channels: int

    @property
    def whole(self) -> Tensor:
        """All of it in one tensor, ``(B * T * min(C, PROJECTED) + 1,)``: what a digest of it is of."""
        return torch.cat((self.values.flatten(), self.values.new_full((1,), self.channels)))


class SecretDirections:
    """The secret directions of one boundary.

    Args:
        boundary: its sender must not know them.
        config: has the seed; without one a seed is drawn.
        device: where signals are.

    Example:
        >>> secret = SecretDirections(Boundary(0, Direction.ACTIVATION), Verification())
        >>> projection = secret.project(torch.zeros(2, 16, 64))
        >>> projection.values.shape, projection.channels
        (torch.Size([2, 16, 32]), 64)
    """

    def __init__(self, boundary: Boundary, config: Verification, device: torch.device | str = "cpu") -> None:
        # Each boundary has directions of its own: what leaks at one says nothing about another.
        gradient = boundary.direction is Direction.GRADIENT
        self._seed = (secret_seed() if config.seed is None else config.seed) * 1_000_003 + 4 * boundary.index + 2 * gradient
        self._slices = config.projections
        self._device = device
        self._cache: dict[tuple[str, int], Tensor] = {}

    def slices(self, channels: int) -> Tensor:
        """Unit directions ``(C, projections)`` of the sliced Wasserstein distance."""
        return self._cached("slices", channels)

    def projection(self, channels: int) -> Tensor:
        """Orthogonal directions ``(C, min(C, PROJECTED))`` that signals are projected on."""
        return self._cached("projection", channels)

    def project(self, signal: Tensor) -> Projection:
        """Project a signal of any shape on the directions."""
        tokens = as_tokens(signal.detach())
        channels = tokens.shape[-1]
        directions = self.projection(channels)
        values = directions.new_empty(*tokens.shape[:2], directions.shape[1])
        for piece in pieces(tokens.shape[1], tokens.numel()):
            values[:, piece] = tokens[:, piece].float() @ directions
        return Projection(values, channels)

    def _cached(self, kind: str, channels: int) -> Tensor:
        if (kind, channels) not in self._cache:
            made = (
                unit_directions(channels, self._slices, self._seed % 2**63, self._device)
                if kind == "slices"
                else orthogonal_directions(channels, PROJECTED, (self._seed + 1) % 2**63, self._device)
            )
            self._cache[kind, channels] = made
        return self._cache[kind, channels]
