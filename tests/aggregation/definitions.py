"""The rules as their papers write them down: one row and one number after the other, from whole rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_sentinel.aggregation.rules import tolerable

__all__ = ["DEFINITIONS", "definition"]


def _coordinates(rows: Tensor, of: Callable[[list[float]], float]) -> Tensor:
    # What is not a number is above all numbers.
    columns = [sorted(column, key=lambda value: (math.isnan(value), value)) for column in rows.T.tolist()]
    return torch.tensor([of(column) for column in columns], dtype=rows.dtype)


def _median(rows: Tensor, f: int) -> Tensor:
    return _coordinates(rows, lambda column: (column[(len(column) - 1) // 2] + column[len(column) // 2]) / 2)


def _trimmed_mean(rows: Tensor, f: int) -> Tensor:
    return _coordinates(rows, lambda column: sum(column[f : len(column) - f]) / (len(column) - 2 * f))


def _scores(rows: Tensor, f: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        distances = [float((row - other).square().sum()) for j, other in enumerate(rows) if j != i]
        nearest = sorted(math.inf if math.isnan(distance) else distance for distance in distances)
        scores.append(sum(nearest[: max(1, len(rows) - f - 2)]))
    return scores


def _krum(rows: Tensor, f: int) -> Tensor:
    scores = _scores(rows, f)
    return rows[scores.index(min(scores))]


def _multi_krum(rows: Tensor, f: int) -> Tensor:
    scores = _scores(rows, f)
    chosen = sorted(range(len(rows)), key=lambda row: scores[row])[: len(rows) - f]
    return rows[chosen].mean(dim=0)


def _centred_clipping(rows: Tensor, f: int) -> Tensor:
    norms = sorted(norm if math.isfinite(norm) else math.inf for norm in rows.norm(dim=1).tolist())
    radius = norms[(len(norms) - 1) // 2]
    centre = torch.zeros_like(rows[0])
    for _ in range(5):
        pulls = [row - centre for row in rows if row.isfinite().all()]
        centre = centre + sum(pull * min(1.0, radius / max(float(pull.norm()), 1e-300)) for pull in pulls) / len(rows)
    return centre


DEFINITIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "median": _median,
    "trimmed_mean": _trimmed_mean,
    "krum": _krum,
    "multi_krum": _multi_krum,
    "centred_clipping": _centred_clipping,
}


def definition(name: str, rows: Tensor) -> Tensor:
    """The rule ``name`` of the rows, of which as many may be anything as can be."""
    return DEFINITIONS[name](rows, tolerable(len(rows), rule=name))
