"""The layers of one stage as a module, which its worker runs, and an auditing worker runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sentinel.errors import add_place
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds, may_draw_on_host, seed_host

__all__ = ["StageLayers", "run_layer", "seeded"]


def seeded(layer: Callable[[Any], Any], seed: int) -> Callable[[Any], Any]:
    """Wrap a layer so that it seeds Python's and NumPy's generators first, also when a backward pass recomputes it."""

    def call(signal: Any) -> Any:
        seed_host(seed)
        return layer(signal)

    return call


def run_layer(layer: Callable[[Any], Any], signal: Any, checkpointing: bool, place: str) -> Any:
    """Call a layer.

    Args:
        layer: the layer.
        signal: its input.
        checkpointing: recompute its activations in the backward pass, with the same random numbers.
        place: a description of the layer, which is added to errors that it raises.
    """
    try:
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, signal, use_reentrant=False)
        return layer(signal)
    except Exception as error:
        add_place(error, f"in {place}, which was given {_described(signal)}")
        raise


def _described(signal: Any) -> str:
    if isinstance(signal, Tensor):
        return f"{signal.dtype} of shape {tuple(signal.shape)}"
    if isinstance(signal, (tuple, list)):
        return ", ".join(map(_described, signal))
    return type(signal).__name__


class StageLayers(nn.Module):
    """Runs layers in sequence, each with random numbers of its own.

    Before each layer, generators are seeded by the layer's number in the whole module, not in the stage. So a micro-batch gets the
    same dropout wherever the module is cut.

    Args:
        layers: of the stage, in order.
        first: number of the stage's first layer in the whole module.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        device: where the stage is.
        places: a description of each layer, for errors.

    Example:
        >>> import torch
        >>> from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
        >>> layers = [torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)]
        >>> cpu = torch.device("cpu")
        >>> whole = StageLayers(layers, 0, False, cpu, ["layer 0", "layer 1"])
        >>> second = StageLayers(layers[1:], 1, False, cpu, ["layer 1"])
        >>> whole.seeds = second.seeds = MicroBatchSeeds(seed=0, step=3, micro_batch=1)
        >>> signal = torch.ones(4, 8)
        >>> _ = whole.seeds.seed_layer(0, cpu)
        >>> bool((second(layers[0](signal)) == whole(signal)).all())
        True
    """

    def __init__(
        self, layers: Sequence[nn.Module], first: int, checkpointing: bool, device: torch.device, places: Sequence[str]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.seeds: MicroBatchSeeds | None = None
        """Seeds of the next forward pass; ``None`` draws from the generators without seeding them."""
        self._fault: Callable[[Any], Any] | None = None
        self._first = first
        self._checkpointing = checkpointing
        self._device = device
        self._places = tuple(places)

    def forward(self, signal: Any) -> Any:
        for index, (layer, place) in enumerate(zip(self.layers, self._places)):
            call: Callable[[Any], Any] = layer
            if self.seeds is not None:
                seed = self.seeds.seed_layer(self._first + index, self._device)
                call = seeded(layer, seed) if may_draw_on_host(layer) else layer
            signal = run_layer(call, signal, self._checkpointing, place)
            if self._fault is not None and index == 0:
                signal = self._fault(signal)
        return signal

    @contextmanager
    def failing(self, fault: Callable[[Any], Any] | None) -> Iterator[None]:
        """A context in which a simulated fault alters the output of the first layer; ``None`` is no fault."""
        self._fault = fault
        try:
            yield
        finally:
            self._fault = None
