"""Audits: another replica of the same stage recomputes a signal, and the two are compared.

All replicas of a stage hold the same weights, so an honest worker's signal can be had again, up to rounding. What is recomputed is
decided by all ranks from the same data and a secret seed: the audited worker cannot know beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.verification.axes import as_tokens

__all__ = ["AuditSchedule", "Outcome", "arithmetic", "causal_order", "made_of_data", "relative_error", "tolerance"]


class Outcome(IntEnum):
    """What an audit says of a signal."""

    MATCHES = 0
    LIED = 1
    """It is not what an honest worker makes of what the sender was sent."""
    ACTIVATION_WITHHELD = 2
    """Who sent the sender its activation gave the auditor another one."""
    GRADIENT_WITHHELD = 3
    """Who sent the sender its gradient gave the auditor another one."""
    DISPUTED = 4
    """One says this, another that, and nobody can tell who lies. What a stage says, and never one of its workers."""


_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_ROOM_OF_TOKENS = 8
"""By how much more one token may differ than a signal: its honest errors are not averaged."""

_ALERT_STEPS = 30
_ALERT_FACTOR = 3
_FACTOR_AT_THE_ENDS = 4
_STEPS_OF_EVERYTHING = 3


def tolerance(dtype: torch.dtype, computed_in: torch.dtype = torch.float32) -> float:
    """The relative error up to which a signal counts as recomputed: rounding and another order of summation stay far below it.

    Args:
        dtype: of the signal.
        computed_in: what float32 is multiplied in where it was computed, from :func:`arithmetic`; the coarser of both counts.

    Example:
        >>> tolerance(torch.float32), tolerance(torch.float32, torch.bfloat16)
        (0.001, 0.05)
    """
    return _TOLERANCE[dtype] if dtype is torch.float64 else max(_TOLERANCE[dtype], _TOLERANCE[computed_in])


def arithmetic(device: torch.device) -> torch.dtype:
    """The coarsest dtype that matrices are multiplied in here and now, where they are float32.

    Under autocast that is its dtype. GPUs may round factors to TF32, which has as many bits of fraction as float16. Workers of one
    stage may sit on different devices, so where one of them rounds, others may not.

    Args:
        device: where it is computed.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     arithmetic(torch.device("cpu"))
        torch.bfloat16
    """
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    rounds = torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
    return torch.float16 if device.type == "cuda" and rounds else torch.float32


def relative_error(claimed: Tensor, recomputed: Tensor) -> Tensor:
    """``norm(claimed - recomputed) / norm(recomputed)`` as a 0-dim tensor; zero if both are the same, finite or not.

    Or an eighth of that of the worst token, if it is more: the norm of a long signal leaves room for one that is another. A token
    counts as at least as large as those of the signal are on average, because small ones may be all rounding.

    Example:
        >>> relative_error(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0]))
        tensor(0.8000)
    """
    claimed, recomputed = claimed.float(), recomputed.float()
    same = ((claimed == recomputed) | (claimed.isnan() & recomputed.isnan())).all()
    difference = claimed - recomputed
    error = torch.linalg.vector_norm(difference) / (torch.linalg.vector_norm(recomputed) + 1e-30)
    if difference.numel():
        sizes = as_tokens(recomputed).square().mean(dim=-1)
        of_tokens = as_tokens(difference).square().mean(dim=-1) / (torch.maximum(sizes, sizes.mean()) + 1e-30)
        error = torch.maximum(error, of_tokens.max().sqrt() / _ROOM_OF_TOKENS)
    return torch.where(same, 0.0, error.nan_to_num(torch.inf, torch.inf))


def made_of_data(mesh: Mesh) -> Tensor:
    """``(boundaries,)`` bool, of which signals nobody but their sender knows what they were made of: the activations of the first
    stage, and the gradients of the last.

    Example:
        >>> made_of_data(Mesh(stages=3, replicas=2)).tolist()
        [True, False, False, True]
    """
    first = {Direction.ACTIVATION: 0, Direction.GRADIENT: mesh.stages - 1}
    return torch.tensor([boundary.sender == first[boundary.direction] for boundary in mesh.boundaries], dtype=torch.bool)


class AuditSchedule:
    """Which signals are audited whatever they look like.

    Each signal is drawn by itself, with probability ``rate``, from a secret seed: whatever was audited before says nothing about
    what is audited next. So a worker that lies is met after ``1 / rate`` lies in the mean, however seldom it lies, and is never
    free to.

    What the first stage makes of its samples and the last of its labels can be compared with nothing, so by features alone a liar
    there is seen least: these signals are drawn up to four times as often, as far as there are not more than twice as many audits
    in all. And where one lies, others may: for 30 steps after a worker was found out at least three times ``rate`` is drawn, and
    three times what is drawn else in its stage; and where that is the first or the last one, everything that can be compared with
    nothing in the step in which it was found, which is done again, and the three after it.

    Args:
        mesh: the workers.
        rate: share of signals, in (0, 1].
        seed: secret.

    Example:
        >>> schedule = AuditSchedule(Mesh(3, 4), rate=0.5, seed=0)
        >>> schedule.draw(step=7, micro_batches=2, found={}).shape
        torch.Size([4, 4, 2])
        >>> AuditSchedule(Mesh(3, 4), rate=0.01, seed=0).rates(7, found={}).tolist()
        [0.03, 0.01, 0.01, 0.03]
    """

    def __init__(self, mesh: Mesh, rate: float, seed: int) -> None:
        self._mesh, self._seed = mesh, seed
        more = min(_FACTOR_AT_THE_ENDS, 1 + len(mesh.boundaries) / 2)
        self._of_data = made_of_data(mesh)
        self._rates = rate * torch.where(self._of_data, more, 1.0).double()
        self._alert = _ALERT_FACTOR * rate
        self._stages = torch.tensor([boundary.sender for boundary in mesh.boundaries])

    def rates(self, step: int, found: Mapping[int, int]) -> Tensor:
        """The share of the signals of each boundary that is drawn in a step, ``(boundaries,)``.

        Args:
            step: number of the training batch.
            found: when a worker of a stage was last found out, by stage.
        """
        alert = [stage for stage, last in found.items() if step - last <= _ALERT_STEPS]
        rates = self._rates.clamp(min=self._alert) if alert else self._rates.clone()
        for stage in alert:
            of_stage = self._stages == stage
            rates[of_stage] = _ALERT_FACTOR * self._rates[of_stage]
        if any(step - found.get(stage, -math.inf) <= _STEPS_OF_EVERYTHING for stage in (0, self._mesh.stages - 1)):
            rates[self._of_data] = 1.0
        return rates.clamp(max=1.0)

    def draw(self, step: int, micro_batches: int, found: Mapping[int, int]) -> Tensor:
        """The audits of a step, ``(boundaries, replicas, micro_batches)`` bool, by samples.

        Args:
            step: number of the training batch.
            micro_batches: of each replica.
            found: when a worker of a stage was last found out, by stage.
        """
        return self._uniform("audits", step, micro_batches) < self.rates(step, found)[:, None, None]

    def one_each(self, step: int, valid: Tensor) -> Tensor:
        """One signal of each sender, of those that say anything; both ``(boundaries, lanes, slots)`` bool."""
        drawn = torch.where(valid, self._uniform("one each", step, valid.shape[2]), -1.0)
        chosen = torch.zeros_like(valid)
        if valid.numel():
            chosen.scatter_(2, drawn.argmax(dim=2, keepdim=True), True)
        return chosen & valid

    def _uniform(self, what: str, step: int, slots: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, what, step))
        shape = len(self._mesh.boundaries), self._mesh.replicas, slots
        return torch.rand(shape, generator=generator, dtype=torch.float64)


def causal_order(mesh: Mesh) -> list[int]:
    """Indices into :attr:`Mesh.boundaries` in the order in which a micro-batch crosses them: forward, then backward.

    Example:
        >>> causal_order(Mesh(stages=3, replicas=1))
        [0, 1, 3, 2]
    """
    boundaries = list(enumerate(mesh.boundaries))
    forward = [index for index, boundary in boundaries if boundary.direction is Direction.ACTIVATION]
    backward = [index for index, boundary in boundaries if boundary.direction is Direction.GRADIENT]
    return forward + backward[::-1]
