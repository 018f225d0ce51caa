"""Tables written by hand, and the assessment that they had at receipt."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sentinel.verification import COLUMNS, SignalTable
from lightning_sentinel.verification.calibration import Assessment, Calibration
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.peers import median_vote, of_workers
from lightning_sentinel.verification.table import MAX_SCORE

F = len(FEATURES)


def table_of(features: Tensor, tainted: Tensor | None = None, calibration: Calibration | None = None) -> SignalTable:
    """Signals ``(boundaries, lanes, micro_batches, F)``, scored at receipt by the fences in force."""
    rows = torch.zeros(*features.shape[:3], len(COLUMNS))
    rows[..., :F] = features
    table = SignalTable(rows)
    if tainted is not None:
        table.column("tainted").copy_(tainted)
    if calibration is not None:
        for boundary in range(len(features)):
            scores, worst = calibration.fences_at_receipt(boundary).scores(features[boundary]).max(dim=-1)
            table.column("score")[boundary] = scores.clamp(max=MAX_SCORE)
            table.column("worst")[boundary] = worst.float()
        table.column("flagged").copy_((table.column("score") > 1) & ~table.tainted)
    table.column("positions").fill_(6)
    return table


def as_received(table: SignalTable, live: Tensor) -> Assessment:
    """No comparison with others: the scores are those of the table."""
    valid = ~table.tainted & live[:, None]
    boundaries, lanes = valid.shape[:2]
    centre = median_vote(of_workers(table.features, valid, torch.arange(lanes).expand(boundaries, lanes)))
    return Assessment(
        by_peers=torch.zeros(boundaries, dtype=torch.bool),
        quorum=torch.ones(boundaries, dtype=torch.bool),
        certain=torch.ones(boundaries, dtype=torch.bool),
        score=table.column("score"),
        recent=torch.zeros(boundaries, lanes),
        typical=torch.zeros(boundaries),
        worst=table.column("worst"),
        valid=valid,
        opinion=centre,
        centre=centre,
    )


def compared(table: SignalTable, live: Tensor) -> Assessment:
    """Everything was compared with others, and the scores are those of the table."""
    return as_received(table, live)._replace(by_peers=torch.ones(len(table.rows), dtype=torch.bool))
