"""Moment features: the shape of a signal's distribution, whatever its mean does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["moment_features", "moment_statistics"]

_TINY = 1e-12
_SMALLEST = 1e-30
_ROUNDING = 1e-6
_GRAM_DIRECTIONS = 16
_QUANTILE_DIRECTIONS = 4
_LEVELS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


def moment_statistics(mean_squares: Tensor, channel_means: Tensor, projected: Tensor) -> dict[str, Tensor]:
    """The statistics that the references of the moment features average.

    Args:
        mean_squares: ``(S, C)``, over the tokens of each sender's signal.
        channel_means: ``(S, C)``, means over the same tokens.
        projected: ``(S, N, K)``, tokens along secret directions.

    Returns:
        ``log_spread`` ``(S, C)``: log standard deviation of each channel, less its mean over channels, so that the size of the
        signal does not enter; ``gram`` ``(S, k * k)`` with trace 1; ``quantiles`` ``(S, 4 * 7)`` in units of the projection's rms.
    """
    # The variance of a channel that is constant up to rounding is set to a share of the mean square of all channels.
    floor = _TINY * mean_squares.mean(dim=-1, keepdim=True) + _SMALLEST
    spread = 0.5 * torch.addcmul(mean_squares, channel_means, channel_means, value=-1).clamp(min=floor).log()
    few = projected[..., :_GRAM_DIRECTIONS]
    norm = torch.linalg.vector_norm(few, dim=(1, 2), keepdim=True)
    gram = (few.mT @ few) / (norm.square() + _SMALLEST)
    ordered = projected[..., :_QUANTILE_DIRECTIONS].sort(dim=1).values
    # One index at a time: a list as an index is a tensor that has to be copied to the GPU, which waits for it.
    quantiles = torch.cat([ordered[:, round(level * (ordered.shape[1] - 1))] for level in _LEVELS], dim=1)
    rms = norm.flatten(1) / few[0].numel() ** 0.5
    return {
        "log_spread": spread - spread.mean(dim=-1, keepdim=True),
        "gram": gram.flatten(1),
        "quantiles": quantiles / (rms + _SMALLEST),
    }


def moment_features(norms: Tensor, statistics: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The features of the family ``moments``, ``(S, 5)``, and of the worst token, ``(S, 1)``: how far the largest stands out.

    Args:
        norms: ``(S, N)``, of all tokens.
        statistics: of the signals, from :func:`moment_statistics`.
        references: their averages over honest signals, without the leading axis.
    """
    spread, gram, quantiles = (statistics[name] - references[name] for name in ("log_spread", "gram", "quantiles"))
    rms = torch.linalg.vector_norm(norms, dim=1) / norms.shape[1] ** 0.5 + _SMALLEST
    deviation, mean = torch.std_mean(norms, dim=1, correction=0)
    magnitudes = torch.stack(
        (
            rms,
            deviation / (mean + _SMALLEST) + _ROUNDING,
            spread.abs().mean(dim=-1) + _TINY,
            torch.linalg.vector_norm(gram, dim=-1) + _TINY,
            quantiles.abs().mean(dim=-1) + _TINY,
            norms.amax(dim=1) / rms + _TINY,
        )
    )
    logs = magnitudes.log().T
    return logs[:, :5], logs[:, 5:]
