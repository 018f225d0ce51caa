"""The table of a step: one row for every signal that crossed a boundary, the same on every rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.wiring import Wiring

__all__ = ["COLUMNS", "MAX_SCORE", "SignalTable", "mask_of", "no_rows", "rows_by_sender", "signal_rows"]

MAX_SCORE = 1e6
"""The highest score, so that scores stay finite in logs and files; a signal that is not finite has this score."""

_LARGEST = 1e30
_GROWTH = 16
_LONGEST = 2**20

COLUMNS = (*FEATURES, "score", "worst", "flagged", "tainted", "positions", "channels")
_SCORE = COLUMNS.index("score")
_WORST = COLUMNS.index("worst")


def signal_rows(
    features: Tensor, score: Tensor, worst: Tensor, flagged: Tensor, tainted: Tensor, positions: int, channels: int
) -> Tensor:
    """Rows of signals, ``(senders, len(COLUMNS))`` float32, built on their device without waiting for it.

    Args:
        features: ``(senders, F)``.
        score: ``(senders,)``, 1 at the fence.
        worst: ``(senders,)``, index of the feature with the highest score; -1 if the signal is not finite.
        flagged: ``(senders,)`` bool, the verdict at receipt.
        tainted: ``(senders,)`` bool, whether an earlier boundary had flagged the micro-batch, so that this signal proves nothing.
        positions: length of the signals' position axis.
        channels: length of the signals' channel axis.
    """
    sizes = (torch.full_like(score, size) for size in (positions, channels))
    rest = torch.stack([column.float() for column in (score, worst, flagged, tainted, *sizes)], dim=1)
    return torch.cat((features, rest), dim=1)


def mask_of(workers: Collection[Worker], mesh: Mesh) -> Tensor:
    """``(stages, replicas)`` bool, which workers of a mesh these are.

    Example:
        >>> mask_of([Worker(1, 0)], Mesh(stages=2, replicas=2))
        tensor([[False, False],
                [ True, False]])
    """
    chosen = torch.zeros(mesh.stages, mesh.replicas, dtype=torch.bool)
    for worker in workers:
        chosen[worker.stage, worker.replica] = True
    return chosen


def no_rows(*shape: int) -> Tensor:
    """Rows of signals that do not exist, ``(*shape, len(COLUMNS))``: as those of tainted signals."""
    rows = torch.zeros(*shape, len(COLUMNS))
    rows[..., COLUMNS.index("tainted")] = 1
    return rows


@dataclass(frozen=True)
class SignalTable:
    """Rows of all signals of a step.

    Args:
        rows: ``(boundaries, lanes, micro_batches, len(COLUMNS))`` on the host, boundaries in the order of
            :attr:`Mesh.boundaries`, micro-batches in the order in which a lane works on them. An empty slot has the row of a
            tainted signal.
    """

    rows: Tensor

    @classmethod
    def by_samples(cls, rows: Tensor, wiring: Wiring) -> SignalTable:
        """Put rows, indexed by the replica that owns the samples, in the order of lanes.

        Args:
            rows: ``(boundaries, replicas, micro_batches, len(COLUMNS))``.
            wiring: which lane works on which samples.
        """
        present = wiring.arrange(torch.ones(rows.shape[1:3], dtype=torch.bool))[..., None]
        arranged = wiring.arrange(rows.movedim(3, 1)).movedim(1, 3)
        return cls(torch.where(present, arranged, no_rows(1)))

    @classmethod
    def believed(cls, rows: Tensor) -> SignalTable:
        """Sanitize rows from other ranks, which may hold anything.

        A row with a feature or a score that is not finite becomes that of a signal that is not finite; flags become 0 or 1; sizes
        become at most 16 times the median of their boundary, and a million, because memory will be reserved for them.

        Args:
            rows: ``(boundaries, lanes, micro_batches, len(COLUMNS))``.

        Example:
            >>> rows = torch.full((1, 1, 1, len(COLUMNS)), torch.nan)
            >>> table = SignalTable.believed(rows)
            >>> float(table.column("score")), float(table.column("worst")), table.tainted.item(), table.rows.isfinite().all().item()
            (1000000.0, -1.0, True, True)
        """
        rows = rows.clone()
        features = rows[..., : len(FEATURES)]
        score = rows[..., _SCORE]
        worst = rows[..., _WORST]
        broken = ~(features.isfinite().all(dim=-1) & score.isfinite() & worst.isfinite())
        features.nan_to_num_(0.0, _LARGEST, -_LARGEST).clamp_(-_LARGEST, _LARGEST)
        score.clamp_(0, MAX_SCORE).masked_fill_(broken, MAX_SCORE)
        worst.round_().clamp_(-1, len(FEATURES) - 1).masked_fill_(broken, -1)
        for name in ("flagged", "tainted"):
            column = rows[..., COLUMNS.index(name)]
            column.copy_((column != 0).to(rows.dtype))
        for name in ("positions", "channels"):
            size = rows[..., COLUMNS.index(name)]
            size.nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(0, _LONGEST)
            if size.numel():
                # The lower median, because memory is reserved for it: of two workers the smaller size.
                sent = torch.where(size > 0, size, torch.nan).flatten(1).nanmedian(dim=1).values.nan_to_num()
                size.copy_(torch.minimum(size, _GROWTH * sent[:, None, None]))
        return cls(rows)

    def column(self, name: str) -> Tensor:
        """``(boundaries, lanes, micro_batches)``."""
        return self.rows[..., COLUMNS.index(name)]

    @property
    def features(self) -> Tensor:
        """``(boundaries, lanes, micro_batches, F)``."""
        return self.rows[..., : len(FEATURES)]

    @property
    def flagged(self) -> Tensor:
        return self.column("flagged").bool()

    @property
    def tainted(self) -> Tensor:
        return self.column("tainted").bool()

    def scored(self, score: Tensor, worst: Tensor) -> SignalTable:
        """The same signals with other scores; both arguments ``(boundaries, lanes, micro_batches)``."""
        rows = self.rows.clone()
        rows[..., COLUMNS.index("score")] = score
        rows[..., COLUMNS.index("worst")] = worst.to(rows.dtype)
        return SignalTable(rows)

    def worker_scores(self, mesh: Mesh, wiring: Wiring) -> Tensor:
        """The highest score of each worker in the step: ``(stages, replicas, 2)``, activation and gradient; NaN where no signal was
        sent, or none could be verified."""
        scores = torch.where(self.tainted, -torch.inf, self.column("score")).amax(dim=2)
        result = torch.full((mesh.stages, mesh.replicas, len(Direction)), -torch.inf)
        for boundary, values in zip(mesh.boundaries, scores):
            workers = torch.tensor(wiring.serving[boundary.sender])
            of_boundary = result[boundary.sender, :, list(Direction).index(boundary.direction)]
            of_boundary.scatter_reduce_(0, workers, values, "amax")
        return torch.where(result.isinf(), torch.nan, result)


def rows_by_sender(receipts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """The rows of one boundary in a step, ``(senders, receipts, len(COLUMNS))``.

    Args:
        receipts: of each receipt the senders and their rows, ``(senders, len(COLUMNS))``; senders whose signals differ in shape are
            verified in groups, each a receipt of its own.

    Example:
        >>> first, second = torch.zeros(1, len(COLUMNS)), torch.ones(1, len(COLUMNS))
        >>> rows_by_sender([((1,), second), ((0,), first)])[:, 0, 0].tolist()
        [0.0, 1.0]
    """
    senders, rows = zip(*receipts)
    if len(set(map(tuple, senders))) == 1:
        return torch.stack(rows, dim=1)
    # In the order of the senders, and of each sender in the order of its receipts.
    of = [sender for some in senders for sender in some]
    order = sorted(range(len(of)), key=of.__getitem__)
    joined = torch.cat(rows)
    return joined[torch.tensor(order, device=joined.device)].unflatten(0, (max(of) + 1, -1))
