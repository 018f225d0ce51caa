"""A layer for all replicas at once, with the random numbers that each of them would draw by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sentinel.pipeline.randomness import Draws, generator_state
from lightning_sentinel.pipeline.stages.stage import run_layer

__all__ = ["SideBySide"]


class SideBySide:
    """Runs layers on the micro-batches of all replicas side by side along the batch axis.

    A layer that draws random numbers runs for each replica by itself. Which ones do is seen from the generator, because dropout may
    be a function as well as a module.

    Args:
        device: that computes.
        checkpointing: recompute activations in the backward pass.
        places: where each layer of the module is, in words.
    """

    def __init__(self, device: torch.device, checkpointing: bool, places: Sequence[str]) -> None:
        self._device, self._checkpointing, self._places = device, checkpointing, tuple(places)
        self._drawing: set[int] = set()
        self.apart = False
        """Whether every layer runs for each replica by itself, because it may mix what is along the first axis."""

    def run(self, number: int, layer: nn.Module, call: Callable[[Any], Any], signals: Any, draws: Sequence[Draws] | None) -> Any:
        """Run one layer.

        Args:
            number: of the layer in the whole module.
            layer: its module.
            call: what runs it.
            signals: ``(replicas * B, ...)``.
            draws: of each replica's micro-batch; ``None`` takes random numbers as they come.
        """
        place = self._places[number]
        if not draws:
            return run_layer(call, signals, self._checkpointing, place)
        if number not in self._drawing and not (self.apart and len(draws) > 1):
            buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()] if len(draws) > 1 else []
            draws[0].seed_layer(number, self._device)
            before = generator_state(self._device)
            output = run_layer(call, signals, self._checkpointing, place)
            if len(draws) == 1 or torch.equal(before, generator_state(self._device)):
                return output
            self._drawing.add(number)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        outputs: list[Tensor] = []
        for draw, signal in zip(draws, _of_each(signals, len(draws))):
            draw.seed_layer(number, self._device)
            outputs.append(run_layer(call, signal, self._checkpointing, place))
        return torch.cat(outputs)


def _of_each(signals: Any, replicas: int) -> Any:
    if isinstance(signals, tuple):
        return zip(*(signal.chunk(replicas) for signal in signals))
    return signals.chunk(replicas)
