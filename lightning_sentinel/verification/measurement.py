"""Measures all features of the signals of some senders in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.verification.axes import as_tokens, batch_means, pieces
from lightning_sentinel.verification.consistency import consistency_features, consistency_statistics, paired
from lightning_sentinel.verification.features import FEATURES, PUBLISHED
from lightning_sentinel.verification.moments import moment_features, moment_statistics
from lightning_sentinel.verification.projection import Projection, SecretDirections
from lightning_sentinel.verification.references import References
from lightning_sentinel.verification.temporal import published_distances, temporal_features

__all__ = ["Measurement", "measure", "measure_published"]


class Measurement(NamedTuple):
    """Measurements of one signal of each sender.

    Args:
        means: ``(senders, T, C)``, over samples.
        features: ``(senders, len(FEATURES))``; zero where there is no reference yet, or no received signal.
        statistics: ``(senders, sum(sizes))``, the statistics that references average, concatenated.
        sizes: names of the statistics, and how many floats each has.
    """

    means: Tensor
    features: Tensor
    statistics: Tensor
    sizes: Mapping[str, int]

    @property
    def finite(self) -> Tensor:
        """``(senders,)`` bool: neither the signal nor any value computed from it is infinite or NaN."""
        # A sum is not finite if one of its terms is not, and NaN is not less than anything.
        return (self.means.sum(dim=(1, 2)) + self.features.sum(dim=1) + self.statistics.sum(dim=1)).abs() < torch.inf


def measure(
    signals: Tensor, senders: int, received: Projection | None, references: References, secret: SecretDirections
) -> Measurement:
    """Measure signals by the features of ``method="sentinel"``.

    Args:
        signals: ``(senders * B, ...)``, the senders' samples, concatenated.
        senders: how many.
        received: the signals that the senders received, on the same secret directions; ``None`` at the ends of the pipeline.
        references: averages over honest signals.
        secret: the directions of this boundary.
    """
    means, mean_squares, projected = _in_pieces(as_tokens(signals), senders, secret)
    positions, channels = means.shape[1:]
    flat = projected.flatten(1, 2)
    parts = moment_statistics(mean_squares, means.mean(dim=1), flat)
    pair = None
    if received is not None:
        pair = paired(projected, received.values.view(senders, -1, *received.values.shape[1:]), received.channels == channels)
        parts |= consistency_statistics(pair)
    statistics = torch.cat(list(parts.values()), dim=1)
    sizes = {name: part.shape[1] for name, part in parts.items()}

    anchor = references.anchor(positions, secret.slices(channels))
    if anchor is None or not references.statistics:
        return Measurement(means, means.new_zeros(senders, len(FEATURES)), statistics, sizes)
    # Along the secret directions, which keep lengths: a pass over a few dozen floats a token in place of all channels.
    norms = torch.linalg.vector_norm(flat, dim=-1)
    temporal = temporal_features(means, anchor)
    moments, largest = moment_features(norms, parts, references.statistics)
    if pair is not None and references.weights is not None:
        input_output, worst = consistency_features(pair, references.weights)
    else:
        input_output = means.new_zeros(senders, 4)
        worst = means.new_zeros(senders, 2)
    features = torch.cat((temporal, moments, input_output, largest, worst), dim=-1)
    return Measurement(means, features, statistics, sizes)


def _in_pieces(tokens: Tensor, senders: int, secret: SecretDirections) -> tuple[Tensor, Tensor, Tensor]:
    """All statistics that need the tokens ``(senders * B, T, C)`` themselves, in float32 but without a copy of them.

    Returns:
        means over samples ``(senders, T, C)``, mean squares of channels ``(senders, C)``, and the tokens along the secret
        directions ``(senders, B, T, K)``.
    """
    tokens = tokens.unflatten(0, (senders, -1))
    samples, positions, channels = tokens.shape[1:]
    directions = secret.projection(channels)
    means = directions.new_empty(senders, positions, channels)
    squares = directions.new_zeros(senders, channels)
    projected = directions.new_empty(senders, samples, positions, directions.shape[1])
    for piece in pieces(positions, tokens.numel()):
        part = tokens[:, :, piece].float()
        torch.mean(part, dim=1, out=means[:, piece])
        squares += torch.linalg.vector_norm(part, dim=(1, 2)).square()
        projected[:, :, piece] = part @ directions
    return means, squares / (samples * positions), projected


def measure_published(signals: Tensor, senders: int, references: References, secret: SecretDirections) -> Measurement:
    """Measure signals by the distances of ``method="paper"``, on their own scale; the other features are zero."""
    means = batch_means(signals, senders)
    features = means.new_zeros(senders, len(FEATURES))
    anchor = references.anchor(means.shape[1], secret.slices(means.shape[2]))
    if anchor is not None:
        features[:, : len(PUBLISHED)] = published_distances(means, anchor)
    return Measurement(means, features, means.new_empty(senders, 0), {})
