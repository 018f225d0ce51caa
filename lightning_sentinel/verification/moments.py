"""Moment features: the shape of a signal's distribution, whatever its mean does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["moment_features", "moment_statistics", "peak_norm"]

_TINY = 1e-12
_SMALLEST = 1e-30
_ROUNDING = 1e-6
_GRAM_DIRECTIONS = 16
_QUANTILE_DIRECTIONS = 4
_LEVELS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


def moment_statistics(tokens: Tensor, channel_means: Tensor, projected: Tensor) -> dict[str, Tensor]:
    """What the references of the moment features are averages of.

    Args:
        tokens: ``(S, N, C)``, the tokens of each sender's signal.
        channel_means: ``(S, C)``.
        projected: ``(S, N, K)``, tokens along secret directions.

    Returns:
        ``log_spread`` ``(S, C)``: log standard deviation of each channel, less its mean over channels, so that the size of the
        signal does not enter; ``gram`` ``(S, k * k)`` with trace 1; ``quantiles`` ``(S, 4 * 7)`` in units of the projection's rms.
    """
    # A channel that is constant up to rounding has no variance of its own, only some share of all channels'.
    second = tokens.square().mean(dim=1)
    floor = _TINY * second.mean(dim=-1, keepdim=True) + _SMALLEST
    spread = 0.5 * (second - channel_means.square()).clamp(min=floor).log()
    few = projected[..., :_GRAM_DIRECTIONS]
    gram = few.transpose(1, 2) @ few
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=-1)
    scale = (trace / (few.shape[1] * few.shape[2])).sqrt() + _SMALLEST
    ordered = projected[..., :_QUANTILE_DIRECTIONS].sort(dim=1).values
    places = [min(ordered.shape[1] - 1, round(level * (ordered.shape[1] - 1))) for level in _LEVELS]
    return {
        "log_spread": spread - spread.mean(dim=-1, keepdim=True),
        "gram": (gram / (trace[:, None, None] + _SMALLEST)).flatten(1),
        "quantiles": (ordered[:, places] / scale[:, None, None]).flatten(1),
    }


def moment_features(norms: Tensor, statistics: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> Tensor:
    """The features of the family ``moments``, ``(S, 5)``.

    Args:
        norms: ``(S, N)``, of all tokens.
        statistics: of the signals, from :func:`moment_statistics`.
        references: their averages over honest signals, without the leading axis.
    """
    spread = statistics["log_spread"] - references["log_spread"]
    gram = statistics["gram"] - references["gram"]
    quantiles = statistics["quantiles"] - references["quantiles"]
    mean, rms = norms.mean(dim=1), _rms(norms)
    variation = (rms.square() - mean.square()).clamp(min=0).sqrt() / (mean + _SMALLEST)
    magnitudes = torch.stack(
        (
            rms + _SMALLEST,
            variation + _ROUNDING,
            spread.abs().mean(dim=-1) + _TINY,
            torch.linalg.vector_norm(gram, dim=-1) + _TINY,
            quantiles.abs().mean(dim=-1) + _TINY,
        ),
        dim=-1,
    )
    return magnitudes.log()


def peak_norm(norms: Tensor) -> Tensor:
    """How far the largest token stands out, ``log max / rms``, ``(S,)``.

    Example:
        >>> import torch
        >>> peak_norm(torch.tensor([[3.0, 3.0, 3.0]]))
        tensor([0.])
    """
    return (norms.amax(dim=1) / (_rms(norms) + _SMALLEST) + _TINY).log()


def _rms(norms: Tensor) -> Tensor:
    return torch.linalg.vector_norm(norms, dim=1) / norms.shape[1] ** 0.5
