"""The stages of a virtual mesh: one copy of the module's layers, which serves all replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sentinel.pipeline.gradients.contributions import trained
from lightning_sentinel.pipeline.gradients.ties import Untied
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.pipeline.running_statistics import RunningStatistics
from lightning_sentinel.pipeline.stages.batched_replicas import BatchedReplicas
from lightning_sentinel.pipeline.stages.partition import StageModel

__all__ = ["VirtualStages"]


class VirtualStages:
    """Runs the layers of each stage.

    Args:
        model: the module with all of its stages.
        device: the module's device.
        checkpointing: recompute the activations of a layer in its backward pass instead of keeping them.
        forward_context: entered around every forward pass.
    """

    def __init__(
        self,
        model: StageModel,
        device: torch.device,
        checkpointing: bool,
        forward_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self.forward_context = forward_context
        layers = model.layers.layers
        parts = model.parts
        self._layers: list[Sequence[nn.Module]] = [layers[parts[one] : parts[one + 1]] for one in range(model.mesh.stages)]
        self.untied = Untied(self._layers)
        self._batched = BatchedReplicas(device, checkpointing, model.places)
        self._statistics = [RunningStatistics(self.buffers(stage)) for stage in range(model.mesh.stages)]

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return self.model.mesh.stages - 1

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The leaf parameters of all stages."""
        return [parameter for stage in self.untied.parameters for parameter in stage]

    def trained(self, stage: int) -> list[nn.Parameter]:
        """The leaf parameters of a stage that are trained."""
        return trained(self.untied.parameters[stage])

    def buffers(self, stage: int) -> list[Tensor]:
        """The buffers of a stage's layers."""
        return [buffer for layer in self._layers[stage] for buffer in layer.buffers()]

    def run_apart(self, apart: bool) -> None:
        """Say whether every layer runs for each replica separately, because it may mix entries along the first axis."""
        self._batched.apart = apart

    def forward(
        self,
        stage: int,
        signals: Any,
        seeds: Sequence[MicroBatchSeeds] | None = None,
        fault: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Forward pass of a stage.

        Args:
            stage: the number of the stage.
            signals: its input: the signals of replicas along the batch axis.
            seeds: the seeds of each replica's micro-batch; ``None`` draws from the generators without seeding them.
            fault: alters the output of the stage's first layer.
        """
        # A copy, because a layer may work in place, which autograd forbids on a leaf, and the gradient is read from the leaf.
        signals = signals.clone() if isinstance(signals, Tensor) and signals.requires_grad else signals
        first = self.model.parts[stage]
        with self.forward_context():
            for number, layer in enumerate(self._layers[stage], first):
                signals = self._batched.run(number, layer, partial(self.untied.call, layer), signals, seeds)
                if fault is not None and number == first:
                    signals = fault(signals)
        return signals

    def forward_counted(
        self,
        stage: int,
        signals: Any,
        seeds: Sequence[MicroBatchSeeds],
        fault: Callable[[Tensor], Tensor] | None,
        left_out: Callable[[], Tensor] | None,
    ) -> Any:
        """A forward pass that restores the stage's buffers if a micro-batch is left out, or the output is not finite.

        Args:
            stage: the number of the stage.
            signals: its input.
            seeds: the seeds of each replica's micro-batch.
            fault: alters the output of the stage's first layer.
            left_out: returns whether one of the micro-batches is left out, 0-dim bool; ``None`` if none ever is.
        """
        before = [] if left_out is None else self._statistics[stage].copies()
        output = self.forward(stage, signals, seeds, fault)
        if left_out is not None and before and isinstance(output, Tensor):
            self._statistics[stage].put_back(before, left_out() | ~output.isfinite().all())
        return output
