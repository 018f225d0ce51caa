"""Audits: another replica of the same stage recomputes a signal, and the two are compared.

All replicas of a stage hold the same weights, so another replica reproduces an honest worker's signal up to rounding. Workers draw
in private what they recompute: the audited worker cannot know beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.verification.axes import as_tokens
from lightning_sentinel.verification.draws import Draws, chance_of_each, surely_honest
from lightning_sentinel.wiring import Wiring

__all__ = [
    "AuditSchedule",
    "Drawn",
    "arithmetic",
    "causal_order",
    "made_of_data",
    "one_each",
    "relative_error",
    "tolerance",
]


_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_ROOM_OF_TOKENS = 8
"""How many times more one token may differ than a whole signal: its honest errors are not averaged."""

_ALERT_STEPS = 30
_ALERT_FACTOR = 3
_FACTOR_AT_THE_ENDS = 4
_STEPS_OF_EVERYTHING = 3


def tolerance(dtype: torch.dtype, computed_in: torch.dtype = torch.float32) -> float:
    """The relative error up to which a signal matches its recomputation; rounding and another order of summation stay far below.

    Args:
        dtype: of the signal.
        computed_in: dtype of float32 matrix products on the computing device, from :func:`arithmetic`; the coarser of both counts.

    Example:
        >>> tolerance(torch.float32), tolerance(torch.float32, torch.bfloat16)
        (0.001, 0.05)
    """
    return _TOLERANCE[dtype] if dtype is torch.float64 else max(_TOLERANCE[dtype], _TOLERANCE[computed_in])


def arithmetic(device: torch.device) -> torch.dtype:
    """The coarsest dtype in which float32 matrices are multiplied under the current settings.

    Under autocast that is the autocast dtype. GPUs may round factors to TF32, which has as many bits of fraction as float16.
    Workers of one stage may use different devices: one may round where others do not.

    Args:
        device: the computing device.

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

    Or an eighth of the worst token's error, if that is larger: the norm of a long signal would hide one wrong token. A token counts
    as at least as large as the signal's tokens are on average, because small ones may be all rounding.

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
    """``(boundaries,)`` bool, boundaries with signals computed from data that only their sender knows: the activations of the first
    stage, and the gradients of the last.

    Example:
        >>> made_of_data(Mesh(stages=3, replicas=2)).tolist()
        [True, False, False, True]
    """
    first = {Direction.ACTIVATION: 0, Direction.GRADIENT: mesh.stages - 1}
    return torch.tensor([boundary.sender == first[boundary.direction] for boundary in mesh.boundaries], dtype=torch.bool)


class Drawn(NamedTuple):
    """What workers have drawn to recompute in a step, ``(replicas, boundaries, lanes, slots)`` bool, by the replica that draws.

    Args:
        signals: drawn by workers of the sender's stage.
        rows: what receivers report of signals, drawn by workers of the receiver's stage.
    """

    signals: Tensor
    rows: Tensor


class AuditSchedule:
    """Which signals and rows are audited whatever their scores, from what workers draw in private.

    Each live worker of a stage draws each signal that another one of its stage sends, and each row that another one reports, by
    itself. One of those that are surely honest draws it with probability ``rate``, so an audit hits a lying worker after
    ``1 / rate`` lies on average, however seldom it lies, and no lie is ever safe.

    Activations of the first stage and gradients of the last have no received signal to be compared with, so features show a liar
    there least: these signals are drawn up to four times as often, as long as the audits at most double in all. And where one
    worker lies, others may: for 30 steps after an audit finds a liar every boundary is drawn at at least three times ``rate``, and
    the liar's stage at three times its own rate. If that is the first or the last stage, all signals computed from data are audited
    in that step, which is done again, and in the three after it.

    Args:
        mesh: the workers.
        rate: share of signals, in (0, 1].

    Example:
        >>> schedule, mesh = AuditSchedule(Mesh(3, 4), rate=0.5), Mesh(3, 4)
        >>> schedule.draw(Draws.seeded(mesh, 0, step=7), 7, {}, Wiring.of(mesh, micro_batches=2)).signals.shape
        torch.Size([4, 4, 4, 2])
        >>> AuditSchedule(mesh, rate=0.01).rates(7, found={}).tolist()
        [0.03, 0.01, 0.01, 0.03]
    """

    def __init__(self, mesh: Mesh, rate: float) -> None:
        self._mesh = mesh
        more = min(_FACTOR_AT_THE_ENDS, 1 + len(mesh.boundaries) / 2)
        self._of_data = made_of_data(mesh)
        self._rates = rate * torch.where(self._of_data, more, 1.0).double()
        self._alert = _ALERT_FACTOR * rate
        self._senders = [boundary.sender for boundary in mesh.boundaries]
        self._receivers = [boundary.receiver for boundary in mesh.boundaries]

    def rates(self, step: int, found: Mapping[int, int]) -> Tensor:
        """Share of each boundary's signals that is drawn in a step by honest workers, ``(boundaries,)``.

        Args:
            step: number of the training batch.
            found: the step in which a worker was last found to lie, by stage.
        """
        alert = [stage for stage, last in found.items() if step - last <= _ALERT_STEPS]
        rates = self._rates.clamp(min=self._alert) if alert else self._rates.clone()
        for stage in alert:
            of_stage = torch.tensor(self._senders) == stage
            rates[of_stage] = _ALERT_FACTOR * self._rates[of_stage]
        if any(step - found.get(stage, -math.inf) <= _STEPS_OF_EVERYTHING for stage in (0, self._mesh.stages - 1)):
            rates[self._of_data] = 1.0
        return rates.clamp(max=1.0)

    def draw(
        self,
        draws: Draws,
        step: int,
        found: Mapping[int, int],
        wiring: Wiring,
        banned: Collection[Worker] = (),
        muted: Collection[Worker] = (),
    ) -> Drawn:
        """The signals and rows to audit in a step.

        Args:
            draws: of the step.
            step: number of the training batch.
            found: the step in which a worker was last found to lie, by stage.
            wiring: which worker serves which lane.
            banned: workers that take part in nothing.
            muted: workers whose votes do not count; they draw nothing.
        """
        rates = self.rates(step, found).tolist()
        work = torch.zeros(len(wiring.work), wiring.slots, dtype=torch.bool)
        for lane in wiring.lanes:
            work[lane, : len(wiring.work[lane])] = True
        return Drawn(
            self._drawn("signals", self._senders, draws, rates, work, wiring, banned, muted),
            self._drawn("rows", self._receivers, draws, rates, work, wiring, banned, muted),
        )

    def _drawn(
        self,
        what: str,
        stages: Sequence[int],
        draws: Draws,
        rates: Sequence[float],
        work: Tensor,
        wiring: Wiring,
        banned: Collection[Worker],
        muted: Collection[Worker],
    ) -> Tensor:
        """What the workers of each boundary's stage in ``stages`` draw of what others of it send or report."""
        mesh = self._mesh
        drawn = torch.zeros(mesh.replicas, len(stages), *work.shape, dtype=torch.bool)
        for stage in sorted(set(stages)):
            boundaries = [index for index, one in enumerate(stages) if one == stage]
            live = [worker for worker in mesh.of_stage(stage) if worker not in banned]
            honest = surely_honest(len(live), sum(worker in muted for worker in live))
            chances = torch.tensor([chance_of_each(rates[index], honest) for index in boundaries], dtype=torch.float64)
            serving = torch.tensor(wiring.serving[stage])
            for worker in live:
                if worker not in muted:
                    numbers = draws.uniform(worker, what, len(boundaries), *work.shape)
                    others = work & (serving != worker.replica)[:, None]
                    drawn[worker.replica, boundaries] = (numbers < chances[:, None, None]) & others
        return drawn


def one_each(draws: Draws, valid: Tensor) -> Tensor:
    """One valid signal of each sender, which nobody knows beforehand.

    Args:
        draws: of the step.
        valid: ``(boundaries, lanes, slots)`` bool, as the result.

    Example:
        >>> chosen = one_each(Draws.seeded(Mesh(2, 3), 0, step=7), torch.ones(2, 3, 4, dtype=torch.bool))
        >>> chosen.sum(dim=2).tolist()
        [[1, 1, 1], [1, 1, 1]]
    """
    numbers = torch.where(valid, draws.together("one each", *valid.shape), -1.0)
    chosen = torch.zeros_like(valid)
    if valid.numel():
        chosen.scatter_(2, numbers.argmax(dim=2, keepdim=True), True)
    return chosen & valid


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
