"""The axes of a signal, named in one place.

Signals come in any shape. All statistics see them as ``(B, T, C)``: samples, positions, channels.

==================  ===============================  ====================
signal              example                          becomes ``(B, T, C)``
==================  ===============================  ====================
``(B,)``            one number a sample              ``(B, 1, 1)``
``(B, F)``          features of an MLP               ``(B, 1, F)``
``(B, T, C)``       hidden states of a transformer   unchanged
``(B, C, H, W)``    feature maps of an image model   ``(B, H * W, C)``
``(B, C, ...)``     volumes and the like             ``(B, positions, C)``
==================  ===============================  ====================
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, float32
from torch.nn.functional import pad

__all__ = ["as_tokens", "batch_means", "pieces", "spread_over"]

_PIECE = 2**17
_MOST_PIECES = 16


def as_tokens(signal: Tensor) -> Tensor:
    """View a signal as samples x positions x channels.

    Args:
        signal: tensor whose first axis is the batch.

    Returns:
        tensor ``(B, T, C)``; a view where the layout allows one.

    Example:
        >>> import torch
        >>> as_tokens(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 8])
    """
    if signal.ndim < 2:
        return signal.reshape(-1, 1, 1)
    if signal.ndim == 2:
        return signal.unsqueeze(1)
    if signal.ndim == 3:
        return signal
    return signal.movedim(1, -1).flatten(1, -2)


def pieces(positions: int, numbers: int) -> list[slice]:
    """How to go through the positions of something large, so that no step on the way needs room for a copy of it.

    Pieces of about 100 000 numbers, which fit into a cache, and no more than 16 of them, because each is work for an accelerator.

    Args:
        positions: how many.
        numbers: in all of them together.

    Example:
        >>> pieces(6, numbers=3 * 2**17)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    count = max(1, min(positions, _MOST_PIECES, -(-numbers // _PIECE)))
    edges = [positions * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


def batch_means(signals: Tensor, groups: int) -> Tensor:
    """Mean over the samples of each signal, ``(groups, T, C)`` in float32: what a momentum tracks.

    A mean is not finite if any element of its signal is not finite.

    Args:
        signals: signals of equal size, one behind the other along the batch axis: ``(groups * B, ...)``.
        groups: how many.

    Example:
        >>> import torch
        >>> batch_means(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), groups=1)
        tensor([[[2., 3.]]])
    """
    tokens = as_tokens(signals).unflatten(0, (groups, -1))
    means = tokens.new_empty(groups, *tokens.shape[2:], dtype=float32)
    for piece in pieces(tokens.shape[2], tokens.numel()):
        means[:, piece] = tokens[:, :, piece].mean(dim=1, dtype=float32)
    return means


def spread_over(reference: Tensor, signal: Tensor) -> Tensor:
    """A reference ``(T', C)`` laid out in the shape of a signal, the same for each sample; missing positions are zero.

    Example:
        >>> import torch
        >>> spread_over(torch.ones(16, 8), torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """
    tokens = as_tokens(signal)
    missing = tokens.shape[1] - reference.shape[0]
    if missing > 0:
        reference = pad(reference, (0, 0, 0, missing))
    reference = reference[: tokens.shape[1]].to(signal.dtype)
    if signal.ndim > 3:
        reference = reference.T.unflatten(1, signal.shape[2:])
    elif signal.ndim <= 2:
        reference = reference[0]
    return reference.expand_as(signal)
