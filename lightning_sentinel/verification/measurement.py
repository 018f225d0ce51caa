"""All features of the signals that came from some senders, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.verification.axes import as_tokens, batch_means
from lightning_sentinel.verification.consistency import consistency_features, consistency_statistics, paired
from lightning_sentinel.verification.features import FEATURES, PUBLISHED
from lightning_sentinel.verification.moments import moment_features, moment_statistics, peak_norm
from lightning_sentinel.verification.projection import Projection, SecretDirections
from lightning_sentinel.verification.references import References
from lightning_sentinel.verification.temporal import published_distances, temporal_features

__all__ = ["Measurement", "measure", "measure_published"]


class Measurement(NamedTuple):
    """What was measured on one signal of each sender.

    Args:
        means: ``(senders, T, C)``, over samples.
        features: ``(senders, len(FEATURES))``; zero where there is no reference yet, or nothing to be compared with.
        statistics: ``(senders, ...)`` by name, what references are averages of.
    """

    means: Tensor
    features: Tensor
    statistics: Mapping[str, Tensor]

    @property
    def finite(self) -> Tensor:
        """``(senders,)`` bool: neither the signal nor what was computed from it is infinite or NaN."""
        # A sum is not finite if one of its terms is not.
        parts = (self.means.flatten(1), self.features, *self.statistics.values())
        return torch.stack([part.sum(dim=1) for part in parts]).sum(dim=0).isfinite()


def measure(
    signals: Tensor, senders: int, received: Projection | None, references: References, secret: SecretDirections
) -> Measurement:
    """Measure signals by the features of ``method="sentinel"``.

    Args:
        signals: ``(senders * B, ...)``, one sender's samples behind the other's.
        senders: how many.
        received: what the senders had received, along the same secret directions; ``None`` at the ends of the pipeline.
        references: what honest signals look like.
        secret: the directions of this boundary.
    """
    tokens = as_tokens(signals).float().unflatten(0, (senders, -1))
    means = tokens.mean(dim=1)
    projected = secret.project(tokens.flatten(0, 1)).values.unflatten(0, (senders, -1))
    flat = tokens.flatten(1, 2)
    statistics = moment_statistics(flat, means.mean(dim=1), projected.flatten(1, 2))
    pair = None
    if received is not None:
        pair = paired(projected, received.values.unflatten(0, (senders, -1)), received.channels == means.shape[-1])
        statistics |= consistency_statistics(pair)

    momentum = references.momentum.value
    if momentum is None or not references.statistics:
        return Measurement(means, means.new_zeros(senders, len(FEATURES)), statistics)
    # Along the secret directions, which keep lengths: a pass over a few dozen floats a token in place of all channels.
    norms = torch.linalg.vector_norm(projected.flatten(1, 2), dim=-1)
    temporal = temporal_features(means, momentum, secret.slices(means.shape[-1]))
    moments = moment_features(norms, statistics, references.statistics)
    if pair is not None and references.weights is not None:
        input_output, worst = consistency_features(pair, references.weights)
    else:
        input_output, worst = means.new_zeros(senders, 4), means.new_zeros(senders, 2)
    features = torch.cat((temporal, moments, input_output, peak_norm(norms)[:, None], worst), dim=-1)
    return Measurement(means, features, statistics)


def measure_published(signals: Tensor, senders: int, references: References, secret: SecretDirections) -> Measurement:
    """Measure signals by the distances of ``method="paper"``, on their own scale; the other features are zero."""
    means = batch_means(signals, senders)
    features = means.new_zeros(senders, len(FEATURES))
    if references.momentum.value is not None:
        features[:, : len(PUBLISHED)] = published_distances(means, references.momentum.value, secret.slices(means.shape[-1]))
    return Measurement(means, features, {})
