"""Input-output features: whether what a stage sent follows from what it had received.

A stage's output is its input plus a small, predictable change. Both are seen along the same secret directions, and a ridge
regression, learned from honest workers, predicts the change of a token from the token itself, its neighbour before it and the mean
of its sample. What a replayed, permuted, swapped or sign-flipped signal gives away is that it does not belong to its input.

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
_PREDICTED = 16
_RIDGE = 1e-3


class Pair(NamedTuple):
    """What senders sent beside what they had received, token by token, in units of the received tokens' rms.

    Args:
        sent: ``(S, N, K)``.
        inputs: ``(S, N, 3 K')``: the received token, the one before it, and the mean of its sample.
        comparable: whether both have the same channels, so that what was sent is what was received plus a change.
    """

    sent: Tensor
    inputs: Tensor
    comparable: bool

    @property
    def received(self) -> Tensor:
        return self.inputs[..., : self.inputs.shape[-1] // 3]

    @property
    def targets(self) -> Tensor:
        """What is predicted, ``(S, N, 16)``: some directions of the change, or of what was sent."""
        return (self.sent - self.received if self.comparable else self.sent)[..., :_PREDICTED]

    @property
    def predictors(self) -> Tensor:
        """What it is predicted from, ``(S, N, 3 K' + 1)``."""
        return torch.nn.functional.pad(self.inputs, (0, 1), value=1.0)


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
    before = received.roll(1, dims=2)
    context = received.mean(dim=2, keepdim=True).expand_as(received)
    return Pair(sent.flatten(1, 2), torch.cat((received, before, context), dim=-1).flatten(1, 2), same_channels)


def consistency_statistics(pair: Pair) -> dict[str, Tensor]:
    """What the ridge regression is made of: mean products of predictors with themselves and with targets, flat for each sender."""
    predictors = pair.predictors
    transposed = predictors.transpose(1, 2) / predictors.shape[1]
    return {"input_input": (transposed @ predictors).flatten(1), "input_target": (transposed @ pair.targets).flatten(1)}


def ridge_weights(references: Mapping[str, Tensor]) -> Tensor:
    """Weights ``(3 K' + 1, 16)`` that predict targets from inputs, from averages of :func:`consistency_statistics`."""
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
    error_rms = error.square().mean(dim=1).sqrt()
    residual = (error_rms / _or_one(_rms(targets)) + _TINY).log()
    peak_residual = (error.amax(dim=1) / _or_one(error_rms) + _TINY).log()
    # Per channel, because there may be more of them on one side.
    received_rms = _or_one(_rms(received) / received.shape[-1] ** 0.5)
    gain = (_rms(sent) / sent.shape[-1] ** 0.5 / received_rms + _TINY).log()
    if pair.comparable:
        cosines = torch.nn.functional.cosine_similarity(sent, received, dim=-1, eps=_TINY)
        # Honest cosines are close to one: on a logarithmic scale they spread evenly.
        cosine, lowest = (1 - torch.stack((cosines.mean(dim=1), cosines.amin(dim=1))) + 1e-6).log()
        change = (_rms(sent - received) / received.shape[-1] ** 0.5 / received_rms + _TINY).log()
    else:
        cosine = lowest = change = torch.zeros_like(residual)
    return torch.stack((cosine, gain, change, residual), dim=-1), torch.stack((lowest, peak_residual), dim=-1)


def _rms(tokens: Tensor) -> Tensor:
    """Root of the mean squared norm of tokens, ``(S, N, K)`` to ``(S,)``."""
    return torch.linalg.vector_norm(tokens, dim=(1, 2)) / tokens.shape[1] ** 0.5


def _or_one(scale: Tensor) -> Tensor:
    """A scale to divide by: where there is nothing at all, as after an excluded gradient, nothing is scaled."""
    return torch.where(scale > 0, scale, 1.0)
