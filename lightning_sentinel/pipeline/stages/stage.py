"""The layers of one stage as a module of their own: what a worker runs, and what whoever audits it runs again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_sentinel.pipeline.randomness import Draws

__all__ = ["StageLayers", "run_layer"]


def run_layer(layer: Callable[[Any], Any], signal: Any, checkpointing: bool) -> Any:
    """Call a layer; with ``checkpointing`` its activations are recomputed in the backward pass, from the same random numbers."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, signal, use_reentrant=False)
    return layer(signal)


class StageLayers(nn.Module):
    """Layers that run one behind the other, each with random numbers of its own.

    In front of every layer the generator is seeded by the layer's number in the whole module, not in the stage. So a micro-batch
    meets the same dropout wherever the module is cut.

    Args:
        layers: of the stage, in order.
        first: number of the first of them in the whole module.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        device: where the stage is.

    Example:
        >>> import torch
        >>> from lightning_sentinel.pipeline.randomness import Draws
        >>> layers = [torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)]
        >>> cpu = torch.device("cpu")
        >>> whole, second = StageLayers(layers, 0, False, cpu), StageLayers(layers[1:], 1, False, cpu)
        >>> whole.draws = second.draws = Draws(seed=0, step=3, micro_batch=1)
        >>> signal = torch.ones(4, 8)
        >>> whole.draws.seed_layer(0, cpu)
        >>> bool((second(layers[0](signal)) == whole(signal)).all())
        True
    """

    def __init__(self, layers: Sequence[nn.Module], first: int, checkpointing: bool, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.draws: Draws | None = None
        """What decides the random numbers of the next forward pass; ``None`` takes them as they come."""
        self._first, self._checkpointing, self._device = first, checkpointing, device

    def forward(self, signal: Any) -> Any:
        if self.draws is not None:
            self.draws.seed_stage(self._first)
        for number, layer in enumerate(self.layers, self._first):
            if self.draws is not None:
                self.draws.seed_layer(number, self._device)
            signal = run_layer(layer, signal, self._checkpointing)
        return signal
