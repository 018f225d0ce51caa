"""Builds layers from DeepSpeed's ``LayerSpec`` and ``TiedLayerSpec``."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["build_specs"]

_ATTRIBUTE = "pipeline_layers"
"""Attribute of the user's module that holds the built layers; part of the keys in checkpoints."""


def build_specs(module: nn.Module, layers: tuple[Any, ...], building: AbstractContextManager[Any]) -> tuple[Any, ...]:
    """Build the specs among these layers, in order, and add them to the module.

    The layer at position ``i`` becomes ``module.pipeline_layers["i"]``, which names its parameters in checkpoints. Layers of one
    ``TiedLayerSpec`` key share the parameters that the spec names.

    Args:
        module: the user's module.
        layers: specs and layers; entries that are no specs stay as they are.
        building: a context entered around the constructors.

    Returns:
        all layers.
    """
    deepspeed_layers = sys.modules.get("deepspeed.runtime.pipe.module")
    if deepspeed_layers is None:
        return layers  # not imported, so there are no specs
    specs = {index: layer for index, layer in enumerate(layers) if isinstance(layer, deepspeed_layers.LayerSpec)}
    if not specs:
        return layers
    built = getattr(module, _ATTRIBUTE, None)
    if built is None:
        tied: dict[str, nn.Module] = {}
        with building:
            built = nn.ModuleDict({str(index): _built(spec, tied) for index, spec in specs.items()})
        module.add_module(_ATTRIBUTE, built)
    return tuple(built[str(index)] if index in specs else layer for index, layer in enumerate(layers))


def _built(spec: Any, tied: dict[str, nn.Module]) -> nn.Module:
    layer: nn.Module = spec.build()
    key = getattr(spec, "key", None)
    if key is not None:
        first = tied.setdefault(key, layer)
        for path in spec.tied_weight_attr:
            owner, _, name = path.rpartition(".")
            setattr(layer.get_submodule(owner), name, first.get_parameter(path))
        if spec.forward_fn is not None:
            # On the instance, so that its parameters keep their names.
            vars(layer)["forward"] = partial(spec.forward_fn, layer)
    return layer
