"""``trainer.world_size`` is the number of processes; who takes it for that of copies of the data is told better."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ThroughputMonitor

from lightning_sentinel.mesh import Mesh

__all__ = ["count_pipelines"]


def count_pipelines(trainer: L.Trainer, mesh: Mesh) -> None:
    """Let Lightning's ``ThroughputMonitor`` count a pipeline where it counts a device: it has the data of one, and works as one.

    What it says of the device is then said of a pipeline, which can do as many operations as its devices together.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ThroughputMonitor):
            for throughput in callback._throughputs.values():
                throughput.world_size = mesh.replicas
                if callback.available_flops is not None:
                    throughput.available_flops = callback.available_flops * mesh.stages
