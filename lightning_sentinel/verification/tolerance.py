"""Audit tolerances: how far a signal may be from its recomputation; measured in the warm-up, lower for one-sided errors.

Devices round differently, so an honest signal is not recomputed bit for bit. The audits of the warm-up show how far apart honest
workers of a mesh are. From then on a signal matches up to four times the largest error seen at its boundary, within two limits. The
upper limit is the tolerance of the dtype on any device: it is coarse, and a worker that errs by nearly as much in one direction
steers the training. The lower limit is a tenth of that, because other kernels may be chosen later: honest bfloat16 was seen to
differ from float32 by 0.10 to 0.26 % of a signal's norm, up to half of the limit, and a gradient that is off by the limit in the
same direction in every step cost 0.001 of the loss.

Below that, signed errors are summed. Rounding has no direction: along one that is drawn from a secret seed its errors cancel out
over audits, and those of a worker that always errs the same way add up. An error steers by what it has in common with what
multiplies it where weights learn from it, not by its mean alone: one whose mean over tokens is zero may be a fixed map of each
token. So errors are also weighted before they are summed, with secret waves of the signal, and of the activation that a gradient
belongs to: an error that depends on a token in whatever way has something in common with almost any wave of it (Bierens 1990,
Econometrica 58, theorem 1). And with secret signs of a token's position. A worker whose errors add up is allowed a fiftieth of the
upper limit, below which no loss was seen, or twice the largest error of the warm-up: devices that round weights differently differ
by a fixed map of each token, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.verification.audit import relative_error, tolerance
from lightning_sentinel.verification.axes import as_tokens
from lightning_sentinel.verification.projection import unit_directions

__all__ = ["ALARM", "DIRECTIONS", "FLOOR", "MEASURED", "TESTS", "Tolerances", "deviation"]

DIRECTIONS = 8
TESTS = 1 + 4 * DIRECTIONS
"""Signed errors: along the signal; and along secret directions, as they are, by the signal, by the activation, and by position."""
MEASURED = 1 + TESTS
"""Floats that measure how far apart two signals are: the error, and signed errors."""

_MULTIPLE = 4.0
_MULTIPLE_ONE_WAY = 2.0
FLOOR = 1 / 10
"""Share of the table by dtype that is always allowed, unless a worker errs one way."""
_COHERENT = 1 / 50
ALARM = 28.0
"""Threshold for the squared sum of signed errors over the sum of their squares: 1 on average if they are independent, and of all
:data:`TESTS` hardly ever as large in one (4e-6 for normal distributions); with errors that are all alike it is their number."""


def deviation(claimed: Tensor, recomputed: Tensor, seed: int, activation: Tensor | None = None) -> Tensor:
    """How far a signal is from its recomputation, ``(MEASURED,)`` float32 on its device.

    Args:
        claimed: the signal.
        recomputed: of the same shape.
        seed: of the directions, secret; the same for all audits of a boundary, or their errors would not add up.
        activation: of the same shape, what a gradient is the gradient of; ``None`` for an activation.

    Example:
        >>> honest = torch.ones(4, 8)
        >>> float(deviation(1.02 * honest, honest, seed=0)[1])
        0.019999...
    """
    error = relative_error(claimed, recomputed)
    honest = as_tokens(recomputed).float()
    difference = as_tokens(claimed).float() - honest
    squared = honest.square().mean() + 1e-30
    along = (difference * honest).mean() / squared
    # A direction is a unit vector: about one over the root of the channels of a constant error lies along it.
    directions = unit_directions(honest.shape[-1], DIRECTIONS, seed, honest.device)
    signed = difference @ directions / squared.sqrt()
    by_signal = _waves(honest, derive_seed(seed, "signal")) * signed
    by_activation = torch.zeros_like(signed)
    if activation is not None:
        by_activation = _waves(as_tokens(activation.detach()).float(), derive_seed(seed, "activation")) * signed
    by_position = _signs(honest.shape[1], derive_seed(seed, "position"), honest.device) * signed
    means = [one.mean(dim=(0, 1)) for one in (signed, by_signal, by_activation, by_position)]
    return torch.cat((error.view(1), along.view(1), *means)).nan_to_num(torch.inf, torch.inf, -torch.inf)


def _waves(tokens: Tensor, seed: int) -> Tensor:
    """Secret weights of tokens ``(B, T, C)`` by what they are, ``(B, T, DIRECTIONS)``: cosines along random directions.

    A fixed map of the tokens has about one over the root of the channels in common with such a wave, if they are alike in all
    directions: weights are as much larger.
    """
    channels = tokens.shape[-1]
    along = tokens @ unit_directions(channels, DIRECTIONS, seed, tokens.device)
    spread, mean = torch.std_mean(along, dim=(0, 1), correction=0)
    phases = torch.rand(DIRECTIONS, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    return math.sqrt(2 * channels) * torch.cos((along - mean) / (spread + 1e-30) + 2 * math.pi * phases)


def _signs(positions: int, seed: int, device: torch.device) -> Tensor:
    """Secret weights of positions, ``(positions, DIRECTIONS)``: signs, as much larger as they cancel out."""
    signs = torch.randint(0, 2, (positions, DIRECTIONS), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return math.sqrt(positions) * (2 * signs - 1).to(device, torch.float32)


class Tolerances:
    """Tolerances by boundary and sender; the same on all ranks, because all record the same audits.

    Args:
        mesh: the workers.
        seed: secret, of the directions.

    Example:
        >>> tolerances = Tolerances(Mesh(3, 4), seed=0)
        >>> tolerances.allowed(0, Worker(0, 1), torch.bfloat16, torch.float32)
        0.05
        >>> tolerances.heard(0, Worker(0, 1), [0.0] * MEASURED)
        >>> round(tolerances.allowed(0, Worker(0, 1), torch.bfloat16, torch.float32), 6)
        0.005
    """

    def __init__(self, mesh: Mesh, seed: int) -> None:
        self._mesh = mesh
        self.seed = seed
        self.learning = True
        """Whether the warm-up lasts, and errors raise the tolerances."""
        count = len(mesh.boundaries)
        self._largest = torch.full((count,), torch.nan, dtype=torch.float64)
        self._sums = torch.zeros(count, mesh.replicas, TESTS, dtype=torch.float64)
        self._squares = torch.zeros(count, mesh.replicas, TESTS, dtype=torch.float64)
        self._audits = torch.zeros(count, mesh.replicas, dtype=torch.float64)

    def seed_of(self, index: int) -> int:
        """The seed of a boundary's directions."""
        return (self.seed * 1_000_003 + index) % 2**63

    def allowed(self, index: int, sender: Worker, dtype: torch.dtype, computed_in: torch.dtype) -> float:
        """The error up to which a signal matches its recomputation.

        Args:
            index: of the boundary.
            sender: of the signal.
            dtype: of the signal.
            computed_in: dtype of float32 matrix products on the device that computed it.
        """
        ceiling = tolerance(dtype, computed_in)
        largest = float(self._largest[index])
        if math.isnan(largest):
            if self.learning:
                return ceiling
            # From now on nobody is known to be honest, and a liar's own audit must not be what others are measured by.
            largest = 0.0
        most = min(ceiling, max(FLOOR * ceiling, _MULTIPLE * largest))
        one_way = max(_COHERENT * ceiling, _MULTIPLE_ONE_WAY * largest)
        return one_way if one_way < most and self.errs_one_way(index, sender, one_way) else most

    def errs_one_way(self, index: int, sender: Worker, least: float) -> bool:
        """Whether the signed errors of a sender add up, where rounding errors cancel out, to more than ``least`` on average."""
        sums = self._sums[index, sender.replica].abs()
        squares = self._squares[index, sender.replica]
        coherent = sums.square() > ALARM * squares
        return bool((coherent & (sums > least * self._audits[index, sender.replica])).any())

    def heard(self, index: int, sender: Worker, measured: Sequence[float]) -> None:
        """Record an audit in which a signal matched.

        Args:
            index: of the boundary.
            sender: of the signal.
            measured: from :func:`deviation`; not finite if the auditor could not measure it.
        """
        error, *signed = (float(value) for value in measured)
        values = torch.tensor([error, *signed], dtype=torch.float64)
        if not bool(values.isfinite().all()) or error < 0:
            return
        if self.learning:
            self._largest[index] = torch.fmax(self._largest[index], values[0])
        # A signed error counts for no more than the error that the audit let through.
        signs = values[1:].clamp(-error, error)
        self._sums[index, sender.replica] += signs
        self._squares[index, sender.replica] += signs.square()
        self._audits[index, sender.replica] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, by boundary."""
        parts = {"largest": self._largest, "sums": self._sums, "squares": self._squares, "number": self._audits}
        return {
            f"{boundary.name}/{name}": part[index].clone()
            for index, boundary in enumerate(self._mesh.boundaries)
            for name, part in parts.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Boundaries that the state lacks, or saved with another number of workers, start afresh."""
        parts = {"largest": self._largest, "sums": self._sums, "squares": self._squares, "number": self._audits}
        for index, boundary in enumerate(self._mesh.boundaries):
            for name, part in parts.items():
                saved = state.get(f"{boundary.name}/{name}")
                if saved is not None and saved.shape == part[index].shape:
                    part[index] = saved
