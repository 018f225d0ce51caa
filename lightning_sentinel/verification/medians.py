"""The median of statistics: of an even number of values the mean of the two in the middle.

``torch.median`` takes the lower of the two. Where workers vote that matters: of eight workers, three that stay just below the
others would make the lowest of five honest ones the median, and all other honest workers would look too high.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["median"]


def median(values: Tensor, dim: int) -> Tensor:
    """The median along one axis, ignoring NaN; NaN where all values are.

    Args:
        values: floating point, any shape.
        dim: the axis that is reduced.

    Example:
        >>> import torch
        >>> median(torch.tensor([[4.0, 1.0, torch.nan, 2.0, 8.0], [torch.nan] * 5]), dim=1)
        tensor([3., nan])
    """
    ordered = values.sort(dim=dim).values  # NaN comes last
    count = (~ordered.isnan()).sum(dim=dim, keepdim=True)
    lower, upper = (
        ordered.gather(dim, place) for place in ((count - 1).clamp(min=0) // 2, (count // 2).clamp(max=values.shape[dim] - 1))
    )
    return ((lower + upper) / 2).squeeze(dim)
