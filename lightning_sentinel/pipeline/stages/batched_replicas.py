"""Runs one layer for the batches of all replicas, with the random numbers that each replica would draw by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_sentinel.pipeline.randomness import HostProbe, MicroBatchSeeds, generator_state, may_draw_on_host
from lightning_sentinel.pipeline.stages.stage import run_layer, seeded

__all__ = ["BatchedReplicas"]


class BatchedReplicas:
    """Runs layers on the micro-batches of all replicas, concatenated along the batch axis.

    A layer that draws random numbers runs for each replica separately. The generators' states show which layers do, because dropout
    may be a function as well as a module.

    Args:
        device: that computes.
        checkpointing: recompute activations in the backward pass.
        places: a description of each layer, for errors.
    """

    def __init__(self, device: torch.device, checkpointing: bool, places: Sequence[str]) -> None:
        self._device = device
        self._checkpointing = checkpointing
        self._places = tuple(places)
        self._drawing: set[int] = set()
        self._probe = HostProbe()
        self.apart = False
        """Whether every layer runs for each replica separately, because it may mix entries along the first axis."""

    def run(
        self, number: int, layer: nn.Module, call: Callable[[Any], Any], signals: Any, seeds: Sequence[MicroBatchSeeds] | None
    ) -> Any:
        """Run one layer.

        Args:
            number: of the layer in the whole module.
            layer: the layer's module.
            call: runs the layer.
            signals: ``(replicas * B, ...)``.
            seeds: of each replica's micro-batch; ``None`` draws from the generators without seeding them.
        """
        place = self._places[number]
        if not seeds:
            return run_layer(call, signals, self._checkpointing, place)
        on_host = may_draw_on_host(layer)
        if len(seeds) == 1:
            return self._run_one(number, call, signals, seeds[0], on_host)
        if number not in self._drawing and not self.apart:
            buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
            seeds[0].seed_layer(number, self._device)
            before = generator_state(self._device)
            if on_host:
                self._probe.set()
            output = run_layer(call, signals, self._checkpointing, place)
            moved = on_host and self._probe.moved()
            if not moved and torch.equal(before, generator_state(self._device)):
                return output
            self._drawing.add(number)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        signals = _of_each(signals, len(seeds))
        return torch.cat([self._run_one(number, call, signal, draw, on_host) for draw, signal in zip(seeds, signals)])

    def _run_one(self, number: int, call: Callable[[Any], Any], signal: Any, seeds: MicroBatchSeeds, on_host: bool) -> Any:
        """Run one layer for one replica, with its seed."""
        seed = seeds.seed_layer(number, self._device)
        call = seeded(call, seed) if on_host else call
        return run_layer(call, signal, self._checkpointing, self._places[number])


def _of_each(signals: Any, replicas: int) -> Any:
    if isinstance(signals, tuple):
        return zip(*(signal.chunk(replicas) for signal in signals))
    return signals.chunk(replicas)
