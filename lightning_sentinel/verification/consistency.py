"""Input-output features: whether what a stage sent follows from what it had received.

A stage's output is its input plus a small, predictable change. Both are seen along the same secret directions, and a ridge
regression, learned from honest workers, predicts the change of a token from the token. What a replayed, permuted, swapped or
sign-flipped signal gives away is that it does not belong to its input.

Where stage changes the number of channels there is no change to speak of: the output itself is predicted. Where it changes the
number of positions, the means of samples take the place of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Pair", "consistency_features", "consistency_statistics", "paired", "ridge_weights"]

_TINY = 1e-12
_ROUNDING = 1e-6
_PREDICTED = 16
_RIDGE = 1e-3


class Pair(NamedTuple):
    """What senders sent beside what they had received, token by token, in units of the received tokens' rms.

    Args:
        sent: ``(S, N, K)``.
        received: ``(S, N, K')``.
        change: ``(S, N, K)``, what was sent less what was received; ``None`` where the channels are not the same ones.
        predictors: ``(S, N, K' + 1)``, the received token and 1.
    """

    sent: Tensor
    received: Tensor
    change: Tensor | None
    predictors: Tensor

    @property
    def targets(self) -> Tensor:
        """What is predicted, ``(S, N, 16)``: some directions of the change, or of what was sent."""
        return (self.sent if self.change is None else self.change)[..., :_PREDICTED]


def paired(sent: Tensor, received: Tensor, same_channels: bool) -> Pair:
    """Bring together what belongs together.

    Args:
        sent: ``(S, B, T, K)``, projected.
        received: ``(S, B, T', K')``, projected.
        same_channels: whether the signals themselves have as many channels.
    """
    if sent.shape[2] != received.shape[2]:
        sent, received = sent.mean(dim=2, keepdim=True), received.mean(dim=2, keepdim=True)
    scale = _or_one(received.square().mean(dim=(1, 2, 3), keepdim=True).sqrt())
    sent, received = sent / scale, received / scale
    sent, received = sent.flatten(1, 2), received.flatten(1, 2)
    predictors = torch.cat((received, torch.ones_like(received[..., :1])), dim=-1)
    return Pair(sent, received, sent - received if same_channels else None, predictors)


def consistency_statistics(pair: Pair) -> dict[str, Tensor]:
    """What the ridge regression is made of: mean products of predictors with themselves and with targets, flat for each sender."""
    products = pair.predictors.transpose(1, 2) @ torch.cat((pair.predictors, pair.targets), dim=-1)
    products = products / pair.predictors.shape[1]
    size = pair.predictors.shape[2]
    return {"input_input": products[..., :size].flatten(1), "input_target": products[..., size:].flatten(1)}


def ridge_weights(references: Mapping[str, Tensor]) -> Tensor:
    """Weights ``(K' + 1, 16)`` that predict targets from inputs, from averages of :func:`consistency_statistics`."""
    size = round(references["input_input"].numel() ** 0.5)
    gram = references["input_input"].view(size, size)
    ridge = _RIDGE * gram.diagonal().mean() + 1e-30
    eye = torch.eye(size, device=gram.device, dtype=gram.dtype)
    # The variant that does not report a singular matrix, and so need not wait for a GPU; with a ridge there is none.
    return torch.linalg.solve_ex(gram + ridge * eye, references["input_target"].view(size, -1)).result


def consistency_features(pair: Pair, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The features of the family ``input_output``, ``(S, 4)``, and of the worst token, ``(S, 2)``.

    Args:
        pair: from :func:`paired`.
        weights: from :func:`ridge_weights`.
    """
    sent, received, targets = pair.sent, pair.received, pair.targets
    error = torch.linalg.vector_norm(targets - pair.predictors @ weights, dim=-1)
    error_rms = _rms_of_norms(error)
    sent_norms, received_norms = torch.linalg.vector_norm(sent, dim=-1), torch.linalg.vector_norm(received, dim=-1)
    received_rms = _or_one(_rms_of_norms(received_norms))
    # Per channel, because there may be more of them on one side.
    per_channel = (received.shape[-1] / sent.shape[-1]) ** 0.5
    residual = error_rms / _or_one(_rms(targets))
    gain = _rms_of_norms(sent_norms) * per_channel / received_rms
    peak_residual = error.amax(dim=1) / _or_one(error_rms)
    if pair.change is None:
        change = far = farthest = torch.ones_like(residual)
    else:
        cosines = (sent * received).sum(dim=-1) / (sent_norms * received_norms + _TINY)
        # Honest cosines are close to one: on a logarithmic scale what is missing to it spreads evenly.
        far, farthest = 1 + _ROUNDING - cosines.mean(dim=1), 1 + _ROUNDING - cosines.amin(dim=1)
        change = _rms(pair.change) / received_rms
    logs = (torch.stack((far, gain, change, residual, farthest, peak_residual), dim=-1) + _TINY).log()
    return logs[:, :4], logs[:, 4:]


def _rms(tokens: Tensor) -> Tensor:
    """Root of the mean squared norm of tokens, ``(S, N, K)`` to ``(S,)``."""
    return torch.linalg.vector_norm(tokens, dim=(1, 2)) / tokens.shape[1] ** 0.5


def _rms_of_norms(norms: Tensor) -> Tensor:
    """The same from norms, ``(S, N)`` to ``(S,)``."""
    return torch.linalg.vector_norm(norms, dim=1) / norms.shape[1] ** 0.5


def _or_one(scale: Tensor) -> Tensor:
    """A scale to divide by: where there is nothing at all, as after an excluded gradient, nothing is scaled."""
    return scale.masked_fill(scale == 0, 1.0)
