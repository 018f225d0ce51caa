"""Robust means of the gradients of a stage's replicas, of which some may be arbitrary.

The gradients of a stage's ``n`` replicas are the rows of a matrix, which is processed piece by piece: no rank needs room for ``n``
whole gradients. There are two kinds of rules. A *coordinate-wise* rule maps a piece ``(n, k)`` to ``(k,)``. A *weighing* rule needs
only the inner products of the rows: it maps their Gram matrix ``(n, n)``, which is a sum over pieces, to weights ``(n,)`` with
which the rows are added up.

``f`` is how many rows may be arbitrary, non-finite included. All rules need fewer than half; Krum and multi-Krum need
``2 f + 2 < n``, or a single arbitrary row: with no accomplice to be close to, it can only be as close to honest rows as they are to
each other.

A weighing rule gives a non-finite row the weight zero as long as it is one of those ``f``. Zero times infinity is NaN, so rows of
weight zero must be left out of the sum: :func:`combine` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "COORDINATE_WISE",
    "WEIGHING",
    "centred_clipping",
    "combine",
    "krum",
    "median",
    "multi_krum",
    "tolerable",
    "trimmed_mean",
]

_CLIPPING_ROUNDS = 5


def median(rows: Tensor, f: int) -> Tensor:
    """Coordinate-wise median (Yin et al., 2018); the mean of the two in the middle of an even number.

    Example:
        >>> median(torch.tensor([[1.0, 5.0], [2.0, 6.0], [90.0, -9.0]]), f=1)
        tensor([2., 5.])
    """
    ordered = rows.sort(dim=0).values
    count = len(rows)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(rows: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean without the ``f`` lowest and the ``f`` highest values (Yin et al., 2018).

    Example:
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), f=1)
        tensor([3.])
    """
    return rows.sort(dim=0).values[f : len(rows) - f].mean(dim=0)


def krum(gram: Tensor, f: int) -> Tensor:
    """The row that is closest to its ``n - f - 2`` nearest others, at least one (Blanchard et al., 2017).

    Example:
        >>> rows = torch.tensor([[0.8], [1.1], [1.0], [1.4], [90.0]])
        >>> krum(rows @ rows.T, f=1)
        tensor([0., 0., 1., 0., 0.])
    """
    weights = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    weights[_spread_of_neighbours(gram, f).argmin()] = 1.0
    return weights


def multi_krum(gram: Tensor, f: int) -> Tensor:
    """The mean of the ``n - f`` rows that are closest to their nearest others (Blanchard et al., 2017).

    Example:
        >>> rows = torch.tensor([[0.9], [1.0], [1.2], [90.0]])
        >>> multi_krum(rows @ rows.T, f=1)
        tensor([0.3333, 0.3333, 0.3333, 0.0000])
    """
    chosen = _spread_of_neighbours(gram, f).argsort(stable=True)[: len(gram) - f]
    weights = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    weights[chosen] = 1.0 / len(chosen)
    return weights


def centred_clipping(gram: Tensor, f: int, radius: float | None = None, rounds: int = _CLIPPING_ROUNDS) -> Tensor:
    """``v <- v + mean_i((x_i - v) min(1, radius / norm(x_i - v)))`` from zero, some rounds (Karimireddy et al., 2021).

    ``v`` stays a combination of the rows, so the Gram matrix is enough.

    Args:
        gram: ``(n, n)``.
        f: unused; the other rules need it.
        radius: how far a row can pull; by default the median norm of the rows, so that honest ones are hardly clipped.
        rounds: of clipping.

    Example:
        >>> rows = torch.tensor([[1.0], [1.0], [90.0]])
        >>> round((centred_clipping(rows @ rows.T, f=1, rounds=50) @ rows).item(), 2)
        1.5
    """
    norms = gram.diagonal().sqrt()
    finite = norms.isfinite()
    # A row at infinite distance is clipped to nothing. The median of norms with a NaN among them would be NaN.
    limit = norms.where(finite, torch.inf).median() if radius is None else norms.new_tensor(radius)
    gram = gram.where(finite[:, None] & finite, 0)
    weights = torch.zeros_like(norms)
    for _ in range(rounds):
        squared = (gram.diagonal() - 2 * gram @ weights + weights @ gram @ weights).where(finite, torch.inf)
        share = (limit / squared.clamp(min=0).sqrt().clamp(min=torch.finfo(gram.dtype).tiny)).clamp(max=1.0) / len(gram)
        weights = weights * (1 - share.sum()) + share
    return weights


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """``weights @ rows`` of the rows with a non-zero weight; the others may be non-finite.

    Args:
        rows: ``(n, k)``.
        weights: ``(n,)``, of a weighing rule.

    Example:
        >>> combine(torch.tensor([[1.0], [2.0], [torch.nan]]), torch.tensor([0.5, 0.5, 0.0]))
        tensor([1.5000])
    """
    weights = weights.to(rows)
    return weights @ rows.where(weights[:, None] != 0, 0)


def tolerable(count: int, tolerated: int | None = None, rule: str = "median") -> int:
    """``f`` of a rule for ``count`` rows: ``tolerated``, but no more than the rule can tolerate; ``None`` for as many as that.

    Example:
        >>> [tolerable(count) for count in (1, 2, 3, 4, 5)], tolerable(4, tolerated=2)
        ([0, 0, 1, 1, 2], 1)
        >>> [tolerable(count, rule="krum") for count in (2, 3, 4, 5, 6, 7)]
        [0, 1, 1, 1, 1, 2]
    """
    most = (count - 1) // 2
    if rule in _AMONG_NEIGHBOURS:
        most = max((count - 3) // 2, min(most, 1))
    return most if tolerated is None else min(tolerated, most)


def _spread_of_neighbours(gram: Tensor, f: int) -> Tensor:
    norms = gram.diagonal()
    squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)
    # A NaN comes from a non-finite row, which is no row's neighbour.
    squared = squared.where(~squared.isnan(), torch.inf).fill_diagonal_(0)
    # Two rows that are each other's nearest tie, always so among three: if rounding decided, replicas would decide differently.
    squared = (squared + squared.T) / 2
    return squared.sort(dim=1).values[:, 1 : max(2, len(gram) - f - 1)].sum(dim=1)


COORDINATE_WISE: dict[str, Callable[[Tensor, int], Tensor]] = {"median": median, "trimmed_mean": trimmed_mean}
WEIGHING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "krum": krum,
    "multi_krum": multi_krum,
    "centred_clipping": centred_clipping,
}
_AMONG_NEIGHBOURS = ("krum", "multi_krum")
