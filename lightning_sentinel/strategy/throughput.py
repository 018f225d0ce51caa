"""Corrects a callback that takes ``trainer.world_size``, the number of processes, for the number of data-parallel replicas."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ThroughputMonitor

from lightning_sentinel.mesh import Mesh

__all__ = ["count_pipelines"]


def count_pipelines(trainer: L.Trainer, mesh: Mesh) -> None:
    """Let Lightning's ``ThroughputMonitor`` count pipelines, not devices: a pipeline has the data of one device, and works as one.

    Its figures per device are then figures per pipeline, which can do as many operations as its devices together.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ThroughputMonitor):
            for throughput in callback._throughputs.values():
                throughput.world_size = mesh.replicas
                if callback.available_flops is not None:
                    throughput.available_flops = callback.available_flops * mesh.stages
