"""Input-output features: whether what a stage sent follows from what it had received.

A stage's output is its input plus a small, predictable change. Both are seen along the same secret directions, and a ridge
regression, learned from honest workers, predicts the change of a token from the token itself, its neighbour before it and the mean
of its sample. What a replayed, permuted, swapped or sign-flipped signal gives away is that it does not belong to its input.

Where stage changes the number of channels there is no change to speak of: the output itself is predicted. Where it changes the
number of positions, the means of samples take the place of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["consistency_features", "consistency_statistics", "paired", "ridge_weights"]

_TINY = 1e-12
_PREDICTED = 16
_RIDGE = 1e-3


def paired(sent: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of both that belong together, ``(S, N, K)`` and ``(S, N, 3 K')``, in units of the received tokens' rms.

    The second has each received token, the one before it, and the mean of its sample.

    Args:
        sent: ``(S, B, T, K)``, projected.
        received: ``(S, B, T', K')``, projected.
    """
    if sent.shape[2] != received.shape[2]:
        sent, received = sent.mean(dim=2, keepdim=True), received.mean(dim=2, keepdim=True)
    scale = received.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 1e-30
    sent, received = sent / scale, received / scale
    before = received.roll(1, dims=2)
    context = received.mean(dim=2, keepdim=True).expand_as(received)
    return sent.flatten(1, 2), torch.cat((received, before, context), dim=-1).flatten(1, 2)


def consistency_statistics(sent: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """What the ridge regression is made of: mean products ``inputs' inputs`` and ``inputs' targets``, flat for each sender.

    Args:
        sent: ``(S, N, K)``, from :func:`paired`.
        inputs: ``(S, N, 3 K')``, from :func:`paired`.
    """
    predictors, targets = _regression(sent, inputs)
    transposed = predictors.transpose(1, 2) / predictors.shape[1]
    return {"input_input": (transposed @ predictors).flatten(1), "input_target": (transposed @ targets).flatten(1)}


def ridge_weights(references: Mapping[str, Tensor]) -> Tensor:
    """Weights ``(3 K' + 1, 16)`` that predict targets from inputs, from averages of :func:`consistency_statistics`."""
    size = round(references["input_input"].numel() ** 0.5)
    gram = references["input_input"].view(size, size)
    ridge = _RIDGE * gram.diagonal().mean() + 1e-30
    eye = torch.eye(size, device=gram.device, dtype=gram.dtype)
    # The variant that does not report a singular matrix, and so need not wait for a GPU; with a ridge there is none.
    return torch.linalg.solve_ex(gram + ridge * eye, references["input_target"].view(size, -1)).result


def consistency_features(sent: Tensor, inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The features of the family ``input_output``, ``(S, 4)``, and of the worst token, ``(S, 2)``.

    Args:
        sent: ``(S, N, K)``, from :func:`paired`.
        inputs: ``(S, N, 3 K')``, from :func:`paired`.
        weights: from :func:`ridge_weights`.
    """
    predictors, targets = _regression(sent, inputs)
    error = torch.linalg.vector_norm(targets - predictors @ weights, dim=-1)
    error_rms = error.square().mean(dim=1).sqrt()
    target_rms = torch.linalg.vector_norm(targets, dim=(1, 2)) / targets.shape[1] ** 0.5
    residual = (error_rms / (target_rms + 1e-30) + _TINY).log()
    peak_residual = (error.amax(dim=1) / (error_rms + 1e-30) + _TINY).log()
    channels = inputs.shape[-1] // 3
    received = inputs[..., :channels]
    received_norm = torch.linalg.vector_norm(received, dim=(1, 2)) / received.shape[2] ** 0.5 + 1e-30
    gain = (torch.linalg.vector_norm(sent, dim=(1, 2)) / sent.shape[2] ** 0.5 / received_norm + _TINY).log()
    if channels == sent.shape[-1]:
        cosines = torch.nn.functional.cosine_similarity(sent, received, dim=-1, eps=1e-30)
        # Honest cosines are close to one: on a logarithmic scale they spread evenly.
        cosine, lowest = (1 - torch.stack((cosines.mean(dim=1), cosines.amin(dim=1))) + 1e-6).log()
        difference = torch.linalg.vector_norm(sent - received, dim=(1, 2)) / received.shape[2] ** 0.5
        change = (difference / received_norm + _TINY).log()
    else:
        cosine = lowest = change = torch.zeros_like(residual)
    return torch.stack((cosine, gain, change, residual), dim=-1), torch.stack((lowest, peak_residual), dim=-1)


def _regression(sent: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    channels = inputs.shape[-1] // 3
    targets = sent - inputs[..., :channels] if channels == sent.shape[-1] else sent
    return torch.nn.functional.pad(inputs, (0, 1), value=1.0), targets[..., :_PREDICTED]
