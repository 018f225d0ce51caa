"""Input-output features: whether the signal that a stage sent follows from the signal that it received.

A stage's output is its input plus a small, predictable change. Both are projected on the same secret directions, and a ridge
regression, learned from honest workers, predicts the change of a token from the token. A replayed, permuted, swapped or
sign-flipped signal does not match its input.

Where a stage changes the number of channels there is no difference to take: the output itself is predicted. Where it changes the
number of positions, the means of samples take the place of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Pair", "consistency_features", "consistency_statistics", "paired", "ridge_weights"]

_TINY = 1e-12
_ROUNDING = 1e-6
_PREDICTED = 16
_RIDGE = 1e-3


class Pair(NamedTuple):
    """Sent and received signals of senders, token by token, in units of the received tokens' rms.

    Args:
        sent: ``(S, N, K)``.
        received: ``(S, N, K')``.
        change: ``(S, N, K)``, ``sent - received``; ``None`` where the channels are not the same ones.
        predictors: ``(S, N, K' + 1)``, the received token and 1.
    """

    sent: Tensor
    received: Tensor
    change: Tensor | None
    predictors: Tensor

    @property
    def targets(self) -> Tensor:
        """The regression targets, ``(S, N, 16)``: some directions of the change, or of the sent signal."""
        return (self.sent if self.change is None else self.change)[..., :_PREDICTED]


def paired(sent: Tensor, received: Tensor, same_channels: bool) -> Pair:
    """Pair the sent with the received signals, on a common scale.

    Args:
        sent: ``(S, B, T, K)``, projected.
        received: ``(S, B, T', K')``, projected.
        same_channels: whether the unprojected signals have equally many channels.
    """
    if sent.shape[2] != received.shape[2]:
        sent, received = sent.mean(dim=2, keepdim=True), received.mean(dim=2, keepdim=True)
    sent, received = sent.flatten(1, 2), received.flatten(1, 2)
    scale = _or_one(torch.linalg.vector_norm(received, dim=(1, 2), keepdim=True) / received[0].numel() ** 0.5)
    sent, received = sent / scale, received / scale
    return Pair(sent, received, sent - received if same_channels else None, pad(received, (0, 1), value=1.0))


def consistency_statistics(pair: Pair) -> dict[str, Tensor]:
    """Statistics of the ridge regression: mean products of predictors with themselves and with targets, flat for each sender."""
    inputs = (pair.predictors / pair.predictors.shape[1]).mT
    return {"input_input": (inputs @ pair.predictors).flatten(1), "input_target": (inputs @ pair.targets).flatten(1)}


def ridge_weights(references: Mapping[str, Tensor]) -> Tensor:
    """Weights ``(K' + 1, 16)`` that predict targets from inputs, from averages of :func:`consistency_statistics`."""
    size = round(references["input_input"].numel() ** 0.5)
    gram = references["input_input"].view(size, size)
    ridge = _RIDGE * gram.diagonal().mean() + 1e-30
    eye = torch.eye(size, device=gram.device, dtype=gram.dtype)
    # solve_ex does not report a singular matrix, and so need not wait for a GPU; with a ridge there is none.
    return torch.linalg.solve_ex(gram + ridge * eye, references["input_target"].view(size, -1)).result


def consistency_features(pair: Pair, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The features of the family ``input_output``, ``(S, 4)``, and of the worst token, ``(S, 2)``.

    Args:
        pair: from :func:`paired`.
        weights: from :func:`ridge_weights`.
    """
    sent = pair.sent
    received = pair.received
    change = pair.change
    targets = pair.targets
    errors = targets - pair.predictors @ weights
    parts = (sent, received, errors, targets) if change is None else (sent, received, errors, targets, change)
    norms = [torch.linalg.vector_norm(part, dim=-1) for part in parts]
    rms = torch.linalg.vector_norm(torch.stack(norms), dim=-1) / sent.shape[1] ** 0.5
    sent_rms, _, error_rms, _, *changed = rms.unbind()
    _, received_scale, error_scale, target_scale, *_ = _or_one(rms).unbind()
    # Per channel, because one side may have more channels.
    gain = sent_rms * (received.shape[-1] / sent.shape[-1]) ** 0.5 / received_scale
    residual = error_rms / target_scale
    peak_residual = norms[2].amax(dim=-1) / error_scale
    if change is None:
        relative_change = far = farthest = torch.ones_like(residual)
    else:
        relative_change = changed[0] / received_scale
        cosines = (sent * received).sum(dim=-1) / (norms[0] * norms[1] + _TINY)
        # A zero token that follows a zero token is consistent: gradients of padding, and of a last token without a target.
        cosines = cosines.masked_fill((norms[0] == 0) & (norms[1] == 0), 1.0)
        # Honest cosines are close to one: their distance to it spreads evenly on a logarithmic scale.
        far = 1 + _ROUNDING - cosines.mean(dim=-1)
        farthest = 1 + _ROUNDING - cosines.amin(dim=-1)
    logs = (torch.stack((far, gain, relative_change, residual, farthest, peak_residual)) + _TINY).log().T
    return logs[:, :4], logs[:, 4:]


def _or_one(scale: Tensor) -> Tensor:
    """A scale to divide by: 1 in place of 0, which an all-zero signal has, as after an excluded gradient."""
    return scale.masked_fill(scale == 0, 1.0)
