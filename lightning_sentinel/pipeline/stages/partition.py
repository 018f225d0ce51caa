"""Cuts a LightningModule into stages, of which this process keeps one."""

from __future__ import annotations

import io
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import lightning as L
import torch
from torch import nn

from lightning_sentinel.errors import ConfigurationError, PipelineModelError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.deepspeed_setup import local_rank_of
from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.elsewhere import Elsewhere
from lightning_sentinel.pipeline.stages.layers import PipelineLayers, find_layers
from lightning_sentinel.pipeline.stages.materialise import materialise, reset_meta_layers, without_values
from lightning_sentinel.pipeline.stages.skeleton import Skeleton
from lightning_sentinel.pipeline.stages.stage import StageLayers
from lightning_sentinel.pipeline.stages.ties import Tie, find_ties

__all__ = ["StageModel", "cut", "is_cut", "layer_names", "refuse_frozen"]

_ATTRIBUTE = "_sentinel_stage_model"


@dataclass(frozen=True)
class StageModel:
    """This process's stage of a module.

    Args:
        mesh: the workers that the module was cut for.
        layers: all layers of the module; those of other stages are not allocated.
        pipeline: DeepSpeed's ``PipelineModule``; ``None`` if this process has all stages.
        stage: the layers of this process; ``None`` if it has all stages.
        parts: stage ``s`` has the layers ``parts[s]`` to ``parts[s + 1] - 1``.
        parameter_names: all parameters of the unsplit module, in its order.
        state_names: all keys of the unsplit module's ``state_dict``.
        parameter_counts: number of trainable parameters in each layer.
        ties: parameters that several stages share.
        homes: the stages that own each entry of the unsplit module's ``state_dict``; none for an entry outside the layers, of which
            all stages have a copy.
        skeleton: the layers of other stages; ``None`` if this process has all stages.
    """

    mesh: Mesh
    layers: PipelineLayers
    pipeline: Any
    stage: StageLayers | None
    parts: tuple[int, ...]
    parameter_names: tuple[str, ...]
    state_names: tuple[str, ...]
    parameter_counts: tuple[int, ...]
    ties: tuple[Tie, ...]
    homes: Mapping[str, frozenset[int]] = field(default_factory=dict)
    skeleton: Skeleton | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StageModel:
        """Return self: a copy of the module, such as an average of its weights, is cut at the same places."""
        return self

    def first_name(self, name: str) -> str:
        """A parameter's first name in the unsplit module, if it has several."""
        return next((tie.name for tie in self.ties if name in tie.names), name)

    def speaks_for(self, stage: int, name: str) -> bool:
        """Whether a stage saves an entry of the ``state_dict``. The last stage saves the entries that all stages have."""
        home = self.homes.get(name, frozenset())
        last = self.mesh.stages - 1
        return self.pipeline is None or stage in home or (not home and stage == self._home_by_layer(name, last))

    def _home_by_layer(self, name: str, otherwise: int) -> int:
        """The stage of an entry that was made after the module was cut, by the name of its layer."""
        stages = range(self.mesh.stages)
        return next((s for s in stages for layer in self.stage_layers(s) if name.startswith(f"{layer}.")), otherwise)

    def stage_layers(self, stage: int) -> tuple[str, ...]:
        """Names of the layers of ``stage``."""
        return self.layers.names[self.parts[stage] : self.parts[stage + 1]]

    @property
    def places(self) -> tuple[str, ...]:
        """A description of each layer, for errors: name, class and stage."""
        stages = [stage for stage in range(self.mesh.stages) for _ in self.stage_layers(stage)]
        named = zip(self.layers.names, self.layers.layers, stages)
        return tuple(f"layer {name} ({type(layer).__name__}) of stage {stage}" for name, layer, stage in named)

    def stage_parameters(self, stage: int) -> int:
        """Number of trainable parameters of ``stage``."""
        return sum(self.parameter_counts[self.parts[stage] : self.parts[stage + 1]])


def is_cut(module: L.LightningModule) -> bool:
    """Whether a module was cut and this process has only its own stage of it."""
    before: StageModel | None = vars(module).get(_ATTRIBUTE)
    return before is not None and before.pipeline is not None


def layer_names(module: L.LightningModule) -> tuple[str, ...]:
    """Names of the layers of a module that was cut, also for a virtual mesh, where all stay; empty for other modules."""
    before: StageModel | None = vars(module).get(_ATTRIBUTE)
    return () if before is None else before.layers.names


def cut(
    module: L.LightningModule,
    mesh: Mesh,
    method: str,
    sequential: str | None,
    activation_checkpointing: bool,
    worker: Worker | None,
    device: torch.device,
    build: DeferredBuild | None = None,
) -> StageModel:
    """Cut a module into ``mesh.stages`` stages and keep this rank's. A module is cut once; later calls return the same result.

    Layers that were built without values are materialised here, but only those of this rank's stage.

    Args:
        module: the user's module.
        mesh: all workers.
        method: how layers are distributed over stages: ``"parameters"`` balances trainable parameters, ``"uniform"`` the number of
            layers, ``"type:REGEX"`` the layers whose class name matches.
        sequential: the ``nn.Sequential`` attribute to cut, if there are several; with ``configure_pipeline``, the entry.
        activation_checkpointing: recompute activations in the backward pass instead of keeping them.
        worker: this process's worker; ``None`` keeps all stages, for a virtual mesh.
        device: where this process computes.
        build: the context in which ``configure_model`` ran, if it did.

    Raises:
        PipelineModelError: if the module cannot be cut.
        ConfigurationError: if the module was cut for another mesh before.
    """
    before: StageModel | None = vars(module).get(_ATTRIBUTE)
    if before is not None and before.pipeline is None and worker is None:
        before = None  # still whole, so it can be cut differently
    if before is not None:
        _check_unchanged(before, module, mesh, worker)
        return before
    build = build or DeferredBuild()
    whole = worker is None and mesh.stages == 1
    layers = find_layers(module, sequential, nullcontext() if worker is None else build, whole)
    if len(layers.layers) < mesh.stages:
        raise PipelineModelError(
            f"{type(module).__name__} has {len(layers.layers)} layers, which cannot be cut into stages={mesh.stages}. Use at most"
            f" {len(layers.layers)} stages, or split the model into more layers."
        )
    reset_meta_layers(layers.layers, layers.names, build, device)
    counts = tuple(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers.layers)
    parts = _parts(layers.layers, counts, mesh.stages, method)
    ties = find_ties(module, layers.layers, parts)
    names = tuple(layers.parameter_names), tuple(layers.state_names)
    stage_model = StageModel(mesh, layers, None, None, parts, *names, counts, ties, _homes(module, layers.layers, parts))
    _check_stages(stage_model, method, worker)
    if worker is not None:
        start = parts[worker.stage]
        stop = parts[worker.stage + 1]
        skeleton = layers.keep_only(start, stop, device)
        stage_model = replace(stage_model, skeleton=skeleton)
    materialise(module, build, () if stage_model.skeleton is None else stage_model.skeleton.modules())
    if worker is not None:
        stage = StageLayers(
            stage_model.layers.layers[start:stop], start, activation_checkpointing, device, stage_model.places[start:stop]
        )
        stage_model = replace(stage_model, stage=stage, pipeline=_pipeline_module(stage, mesh, worker, device))
        if mesh.stages > 1 and layers.entry is not None:
            of = "" if layers.entry is module else f"The {type(layers.entry).__name__} of "
            # Set on the instance, as the pipeline's forward is while steps run.
            vars(layers.entry)["forward"] = Elsewhere(f"{of}{type(module).__name__}", worker.stage, mesh.stages)
    vars(module)[_ATTRIBUTE] = stage_model
    return stage_model


def _homes(module: nn.Module, layers: Sequence[nn.Module], parts: Sequence[int]) -> dict[str, frozenset[int]]:
    stages: defaultdict[int, set[int]] = defaultdict(set)
    for stage, (start, stop) in enumerate(itertools.pairwise(parts)):
        for layer in layers[start:stop]:
            for tensor in (*layer.parameters(), *layer.buffers()):
                stages[id(tensor)].add(stage)
    return {name: frozenset(stages.get(id(tensor), ())) for name, tensor in module.state_dict(keep_vars=True).items()}


def _check_unchanged(before: StageModel, module: L.LightningModule, mesh: Mesh, worker: Worker | None) -> None:
    name = type(module).__name__
    if before.mesh != mesh or worker is None:
        raise ConfigurationError(
            f"{name} was already cut for {before.mesh}, and this process has only its own stage of it. To use it on {mesh}, load a"
            " checkpoint into a new instance."
        )
    if without_values(module):
        raise PipelineModelError(
            f"{name}.configure_model has built the layers once more, after the module was cut. Lightning calls it for every fit,"
            " validate and test: begin it with `if self.net is not None: return`, for whatever attribute it sets."
        )


def refuse_frozen(module: nn.Module) -> NoReturn:
    """Raise ``PipelineModelError``, because no parameter requires gradients."""
    raise PipelineModelError(
        f"{type(module).__name__} has no trainable parameters in its layers, so there is nothing to train. Let some require"
        " gradients."
    )


def _check_stages(model: StageModel, method: str, worker: Worker | None) -> None:
    stages = range(model.mesh.stages)
    name = type(model.layers.module).__name__
    without = [stage for stage in stages if not model.stage_layers(stage)]
    if without:
        raise PipelineModelError(
            f"Cut into {len(stages)} stages by partition={method!r}, {name} has no layers in stage(s) {without}. Use fewer stages,"
            " or partition='uniform'."
        )
    # On a virtual mesh a callback may still unfreeze parameters before training begins.
    if worker is not None and not any(model.parameter_counts):
        refuse_frozen(model.layers.module)


def _pipeline_module(stage: StageLayers, mesh: Mesh, worker: Worker, device: torch.device) -> Any:
    from deepspeed.runtime.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    topology = PipeDataParallelTopology(num_pp=mesh.stages, num_dp=mesh.replicas)
    # DeepSpeed would assign the first ranks to the first stage; use the mesh's mapping instead.
    topology.mapping = {place: mesh.rank(Worker(place.pipe, place.data)) for place in topology.mapping}
    # One layer per stage, because we have cut the module: DeepSpeed would count, build and hold the layers of all stages.
    layers = [stage if number == worker.stage else nn.Identity() for number in range(mesh.stages)]
    # Suppress DeepSpeed's printout of the partition; we print one table.
    with redirect_stdout(io.StringIO()), local_rank_of(device):
        return PipelineModule(layers=layers, topology=topology, partition_method="uniform")


def _parts(layers: Sequence[nn.Module], counts: Sequence[int], stages: int, method: str) -> tuple[int, ...]:
    """The stage boundaries that DeepSpeed's ``PipelineModule`` would choose, as in :attr:`StageModel.parts`."""
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    if method == "uniform":
        return tuple(map(int, partition_uniform(num_items=len(layers), num_parts=stages)))
    weights = list(counts)
    if method.startswith("type:"):
        pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
        weights = [int(bool(pattern.search(type(layer).__name__))) for layer in layers]
        if not any(weights):
            raise ConfigurationError(
                f"partition={method!r} matches none of the layers' classes: {sorted({type(layer).__name__ for layer in layers})}."
                " Name one of them, or use partition='parameters'."
            )
    return tuple(map(int, partition_balanced(weights=weights, num_parts=stages)))
