"""The table that rank zero prints at the start: which ranks serve which layers, and how the mesh is protected."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_sentinel.pipeline.stages.partition import StageModel

__all__ = ["mesh_table", "print_mesh"]


def mesh_table(model: StageModel) -> Table:
    """Stage, layers, trainable parameters and ranks of a cut module."""
    mesh = model.mesh
    table = Table(title=f"{mesh.stages} stages x {mesh.replicas} replicas")
    for heading, side in (("stage", "right"), ("layers", "left"), ("parameters", "right"), ("ranks", "left")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for stage in range(mesh.stages):
        layers = model.stage_layers(stage)
        ranks = mesh.stage_ranks(stage)
        span = layers[0] if len(layers) == 1 else f"{layers[0]} .. {layers[-1]} ({len(layers)})"
        served_by = "this process" if model.pipeline is None else ", ".join(map(str, ranks))
        table.add_row(str(stage), span, f"{model.stage_parameters(stage):,}", served_by)
    return table


def print_mesh(model: StageModel, protection: str) -> None:
    # Below the table and not as its caption, which would be as narrow as the table.
    Console().print(mesh_table(model), protection, sep="\n")
