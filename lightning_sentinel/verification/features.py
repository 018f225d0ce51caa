"""What is measured on a signal: all features, in families, with their formulas.

``X`` is a signal of ``N`` tokens (samples x positions) and ``C`` channels, ``X_in`` what its sender had received in the same
direction (for a gradient: the gradient from the stage behind). ``h`` is the mean of ``X`` over samples, ``m`` the momentum. ``p_t``
and ``q_t`` are token ``t`` of ``X`` and ``X_in`` along secret directions (:mod:`lightning_sentinel.verification.projection`), and
``rms`` is the root of a mean square over tokens; the cosine of a token that is zero on both sides is 1. References (``~``) are
moving averages over what honest workers sent.

=====================  ==========================================================================================  ============
feature                formula                                                                                     source
=====================  ==========================================================================================  ============
**temporal**           a signal against the momentum (:mod:`~lightning_sentinel.verification.distances`)
``l1``                 log mean abs(h - m)                                                                         SENTINEL
``l2``                 log norm(h - m) / norm(m)                                                                   SENTINEL
``sign_flip_ratio``    share of elements of h with another sign than m                                             SENTINEL
``sliced_wasserstein`` log mean over 16 directions of W1(h, m)                                                     SENTINEL
``channel_l2``         ``l2`` of the means over positions as well, ``(C,)``                                        ours
``channel_wasserstein`` log W1 between the C values of both                                                        ours
**moments**            the shape of a signal's distribution (:mod:`~lightning_sentinel.verification.moments`)
``norm``               log rms(norm(p_t))                                                                          ours
``norm_variation``     log std(norm(p_t)) / mean(norm(p_t))                                                        ours
``channel_spread``     log mean abs(s - s~), s_c = log std of channel c, less its mean over channels               ours
``gram``               log norm(G - G~), G = P'P / trace of 16 directions                                          ours
``quantiles``          log mean abs(u - u~), 7 quantiles along 4 directions, over the rms                          ours
**input_output**       what the stage did (:mod:`~lightning_sentinel.verification.consistency`)
``cosine``             log(1 - mean cos(p_t, q_t))                                                                 ours
``gain``               log rms(p_t) / rms(q_t)                                                                     ours
``change``             log rms(p_t - q_t) / rms(q_t)                                                               ours
``residual``           log rms(e_t) / rms(y_t), e_t = y_t - W [q_t, 1] by ridge regression                         ours
**extremes**           the worst token, which averages hide
``peak_norm``          log max norm(p_t) / rms                                                                     ours
``lowest_cosine``      log(1 - min cos(p_t, q_t))                                                                  ours
``peak_residual``      log max norm(e_t) / rms(e_t)                                                                ours
=====================  ==========================================================================================  ============

SENTINEL: arXiv 2603.03592. Ratios and distances are on a logarithmic scale: what is too close (zeros, shrunk or replayed values)
lies a *factor* below the honest distances, and a lower fence on a linear scale would be negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.errors import ConfigurationError

__all__ = ["FAMILIES", "FEATURES", "resolution", "watched"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "temporal": ("l1", "l2", "sign_flip_ratio", "sliced_wasserstein", "channel_l2", "channel_wasserstein"),
    "moments": ("norm", "norm_variation", "channel_spread", "gram", "quantiles"),
    "input_output": ("cosine", "gain", "change", "residual"),
    "extremes": ("peak_norm", "lowest_cosine", "peak_residual"),
}
"""Names of the features by family."""

FEATURES = tuple(name for family in FAMILIES.values() for name in family)
"""Names of all features, in the order of a table's columns."""

PUBLISHED = FAMILIES["temporal"][:4]
"""The distances of the published method."""


_LOGARITHM = 2.0**-10


def resolution(positions: Tensor, channels: Tensor) -> Tensor:
    """How much each feature of a signal of this size differs for reasons that say nothing, ``(..., len(FEATURES))``.

    A feature that did not move in the warm-up is not known to stand still. ``sign_flip_ratio`` is a count over ``T C`` elements: a
    channel or a position whose mean is close to zero changes its signs together, so its step is one over the larger of both. All
    others are logarithms of averages, which rounding in half precision (10 bits of fraction) moves by no more than ``2 ** -10``.

    Args:
        positions: ``(...)``, T.
        channels: ``(...)``, C.

    Example:
        >>> resolution(torch.tensor(16), torch.tensor(64))[[0, 2]]
        tensor([0.0010, 0.0156])
    """
    share = 1 / torch.maximum(positions, channels).clamp(min=1)
    is_share = torch.tensor([name == "sign_flip_ratio" for name in FEATURES])
    return torch.where(is_share, share[..., None], _LOGARITHM)


def watched(config: Verification) -> Tensor:
    """Which features are fenced, ``(len(FEATURES),)`` bool.

    Raises:
        ConfigurationError: if a name is unknown, or is no feature of the method.

    Example:
        >>> watched(Verification(method="paper")).sum().item()
        4
    """
    known: Sequence[str] = PUBLISHED if config.method == "paper" else FEATURES
    if config.features is None:
        return torch.tensor([name in known for name in FEATURES])
    if isinstance(config.features, str):
        raise ConfigurationError(f"Verification.features={config.features!r} is one name. Write a list: [{config.features!r}].")
    chosen: set[str] = set()
    for name in config.features:
        members = [feature for feature in FAMILIES.get(name, (name,)) if feature in known]
        if not members:
            families = "" if config.method == "paper" else f", or a family: {', '.join(FAMILIES)}"
            raise ConfigurationError(
                f"Verification.features names {name!r}, which method={config.method!r} does not have. It has {', '.join(known)}"
                f"{families}."
            )
        chosen.update(members)
    if not chosen:
        raise ConfigurationError("Verification.features=() watches nothing. Name features, or use None for all of them.")
    return torch.tensor([name in chosen for name in FEATURES])
