"""How a Trainer wants gradients clipped."""

from __future__ import annotations

from typing import Literal, NamedTuple

import lightning as L
from lightning.pytorch.utilities import GradClipAlgorithmType

__all__ = ["Clipping"]


class Clipping(NamedTuple):
    """What ``Trainer(gradient_clip_val=..., gradient_clip_algorithm=...)`` says.

    Args:
        limit: of the norm of all stages' gradients together, or of each value; 0 does not clip.
        by: which of the two.

    Example:
        >>> Clipping.of(L.Trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value", logger=False, barebones=True))
        Clipping(limit=0.5, by='value')
    """

    limit: float = 0.0
    by: Literal["norm", "value"] = "norm"

    @classmethod
    def of(cls, trainer: L.Trainer) -> Clipping:
        by_value = trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        return cls(float(trainer.gradient_clip_val or 0.0), "value" if by_value else "norm")
