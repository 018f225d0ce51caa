"""A LightningModule cut into stages, of which this process keeps one."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from lightning_sentinel.errors import ConfigurationError, PipelineModelError
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.layers import PipelineLayers, find_layers

__all__ = ["StageModel", "cut"]

_ATTRIBUTE = "_sentinel_stage_model"


@dataclass(frozen=True)
class StageModel:
    """This process's stage of a module.

    Args:
        mesh: the workers that the module was cut for.
        layers: all layers of the module; those of other stages are gone from it.
        pipeline: DeepSpeed's ``PipelineModule``; ``None`` where this process has all stages.
        parts: stage ``s`` has the layers ``parts[s]`` to ``parts[s + 1] - 1``.
        parameter_names: all parameters of the unsplit module, in its order.
        state_names: all keys of the unsplit module's ``state_dict``.
        parameter_counts: trainable parameters of each layer.
    """

    mesh: Mesh
    layers: PipelineLayers
    pipeline: Any
    parts: tuple[int, ...]
    parameter_names: tuple[str, ...]
    state_names: tuple[str, ...]
    parameter_counts: tuple[int, ...]

    def stage_layers(self, stage: int) -> tuple[str, ...]:
        """Names of the layers of ``stage``."""
        return self.layers.names[self.parts[stage] : self.parts[stage + 1]]

    def stage_parameters(self, stage: int) -> int:
        """Trainable parameters of ``stage``."""
        return sum(self.parameter_counts[self.parts[stage] : self.parts[stage + 1]])


def cut(
    module: L.LightningModule, mesh: Mesh, method: str, sequential: str | None, activation_checkpointing: bool, virtual: bool
) -> StageModel:
    """Cut a module into ``mesh.stages`` stages and keep this rank's. A module is cut once; later calls return the same.

    Args:
        module: the user's module.
        method: how layers are dealt to stages: ``"parameters"`` balances trainable parameters, ``"uniform"`` the number of layers,
            ``"type:REGEX"`` the layers whose class name matches.
        sequential: attribute that holds the layers, if it is not the only one.
        activation_checkpointing: recompute activations in the backward pass instead of keeping them.
        virtual: keep all stages, for a mesh in this process.

    Raises:
        PipelineModelError: if the module cannot be cut.
        ConfigurationError: if it was cut for another mesh before.
    """
    before: StageModel | None = vars(module).get(_ATTRIBUTE)
    if before is not None and before.pipeline is None and virtual:
        before = None  # still whole, so it can be cut differently
    if before is not None:
        if before.mesh != mesh or virtual:
            raise ConfigurationError(
                f"{type(module).__name__} was already cut for {before.mesh}, and this process has only its own stage of it. To use"
                f" it on {mesh}, load a checkpoint into a new instance."
            )
        return before
    layers = find_layers(module, sequential)
    counts = tuple(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers.layers)
    if len(layers.layers) < mesh.stages:
        raise PipelineModelError(
            f"{type(module).__name__} has {len(layers.layers)} layers, which cannot be cut into stages={mesh.stages}. Use at most"
            f" {len(layers.layers)} stages, or split the model into more layers."
        )
    parameter_names, state_names = tuple(layers.parameter_names), tuple(layers.state_names)
    pipeline: Any = None
    if virtual:
        parts = _parts(layers.layers, counts, mesh.stages, method)
    else:
        pipeline = _pipeline_module(layers.layers, mesh, method, activation_checkpointing)
        parts = tuple(map(int, pipeline.parts))
    stage_model = StageModel(mesh, layers, pipeline, parts, parameter_names, state_names, counts)
    without = [stage for stage in range(mesh.stages) if stage_model.stage_parameters(stage) == 0]
    if without:
        raise PipelineModelError(
            f"Cut into {mesh.stages} stages by partition={method!r}, {type(module).__name__} has no trainable parameters in"
            f" stage(s) {without}: {', '.join(stage_model.stage_layers(without[0]))}. Use fewer stages, or partition='parameters'."
        )
    vars(module)[_ATTRIBUTE] = stage_model
    return stage_model


def _pipeline_module(layers: tuple[nn.Module, ...], mesh: Mesh, method: str, activation_checkpointing: bool) -> Any:
    from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint
    from deepspeed.runtime.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    # DeepSpeed prints its own account of the partition; ours is one table.
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = PipelineModule(
            layers=list(layers),
            topology=PipeDataParallelTopology(num_pp=mesh.stages, num_dp=mesh.replicas),
            partition_method=method,
            activation_checkpoint_interval=int(activation_checkpointing),
            activation_checkpoint_func=non_reentrant_checkpoint,
        )
    for parameter in pipeline.parameters():
        # DeepSpeed's clipping counts only parameters with this mark on stages other than the first (deepspeed/runtime/utils.py,
        # is_model_parallel_parameter): without it the norm is that of the first stage.
        parameter.model_parallel = True
    return pipeline


def _parts(layers: tuple[nn.Module, ...], counts: tuple[int, ...], stages: int, method: str) -> tuple[int, ...]:
    """The same bounds as ``PipelineModule``'s, which cannot be made without processes."""
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    if method == "uniform":
        return tuple(map(int, partition_uniform(num_items=len(layers), num_parts=stages)))
    weights = list(counts)
    if method.startswith("type:"):
        pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
        weights = [int(bool(pattern.search(type(layer).__name__))) for layer in layers]
    return tuple(map(int, partition_balanced(weights=weights, num_parts=stages)))
