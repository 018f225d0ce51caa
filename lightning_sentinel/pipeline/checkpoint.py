"""One ordinary Lightning checkpoint from many stages, and back.

The file has the keys of the unsplit module and an optimizer state in torch's own format, so that ``load_from_checkpoint`` and a run
on one process can read it. Stages hand their part to rank zero as JSON and tensors, never as pickled objects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.parcels import receive_parcel, send_parcel

__all__ = ["collect", "merge_optimizer_states", "optimizer_part", "own_optimizer_state", "select_state"]

Part = tuple[dict[str, Any], dict[str, Tensor]]


def collect(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], mesh: Mesh, banned: Collection[Worker] = ()) -> list[Part]:
    """Bring a part from each stage to rank zero; to be called by all ranks. One process has all there is.

    Args:
        plain: what JSON can say.
        tensors: the rest.
        mesh: all workers.
        banned: workers that are not asked, because nobody brings them up to date. Rank zero writes the file all the same.

    Returns:
        on rank zero the parts of all stages, in order, on the host; elsewhere nothing.
    """
    mine = (dict(plain), {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    if not dist.is_initialized():
        return [mine]
    rank = dist.get_rank()
    stages = [mesh.stage_ranks(stage) for stage in range(mesh.stages)]
    speakers = [next((r for r in ranks if mesh.worker(r) not in banned), ranks[0]) for ranks in stages]
    if rank != 0:
        if rank in speakers:
            send_parcel(mine, 0)
        return []
    return [mine if speaker == 0 else receive_parcel(speaker) for speaker in speakers]


def select_state(state: Mapping[str, Any], module: nn.Module, known: Sequence[str], strict: bool) -> dict[str, Any]:
    """The entries of an unsplit ``state_dict`` that belong to this stage.

    Args:
        state: of the unsplit module.
        module: this stage's part of it.
        known: all keys of the unsplit module.
        strict: whether every key must be there and none more; judged over the whole module, so that all ranks agree.

    Raises:
        ConfigurationError: if strict and the keys differ.
    """
    missing, unexpected = sorted(set(known) - set(state)), sorted(set(state) - set(known))
    if strict and (missing or unexpected):
        raise ConfigurationError(
            f"The checkpoint does not fit {type(module).__name__}: {len(missing)} key(s) missing (first: {missing[:3]}),"
            f" {len(unexpected)} unexpected (first: {unexpected[:3]}). Build the module with the arguments that it was saved with."
        )
    return {name: state[name] for name in module.state_dict() if name in state}


def optimizer_part(optimizer: Optimizer, names: Mapping[int, str]) -> Part:
    """This stage's optimizer state, by parameter name.

    Args:
        optimizer: over this stage's parameters.
        names: ``id`` of a parameter to its name in the unsplit module.
    """
    plain: dict[str, Any] = {"groups": [], "numbers": []}
    tensors = {}
    for group in optimizer.param_groups:
        plain["groups"].append([names[id(parameter)] for parameter in group["params"]])
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{names[id(parameter)]}/{key}"] = value
                else:
                    plain["numbers"].append([names[id(parameter)], key, value])
    return plain, tensors


def merge_optimizer_states(
    parts: Sequence[Part], options: Sequence[Mapping[str, Any]], order: Sequence[str]
) -> tuple[dict[str, Any], list[list[str]]]:
    """One optimizer state in torch's format.

    Args:
        parts: what :func:`optimizer_part` gave on each stage.
        options: of each parameter group, without its parameters.
        order: parameter names of the unsplit module.

    Returns:
        the state, with parameters numbered group by group in ``order``, and their names by group.
    """
    position = {name: index for index, name in enumerate(order)}
    groups = [
        sorted({name for plain, _ in parts for name in plain["groups"][index]}, key=position.__getitem__)
        for index in range(len(options))
    ]
    number = {name: index for index, name in enumerate(name for group in groups for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for plain, tensors in parts:
        for path, tensor in tensors.items():
            name, key = path.rsplit("/", 1)
            state.setdefault(number[name], {})[key] = tensor
        for name, key, value in plain["numbers"]:
            state.setdefault(number[name], {})[key] = value
    param_groups = []
    for option, group in zip(options, groups):
        # Made from named_parameters() a group lists the names of its parameters, and each stage's only its own.
        named = {"param_names": group} if "param_names" in option else {}
        param_groups.append({**option, **named, "params": [number[name] for name in group]})
    return {"state": dict(sorted(state.items())), "param_groups": param_groups}, groups


def own_optimizer_state(
    saved: Mapping[str, Any], groups: Sequence[Sequence[str]], optimizer: Optimizer, names: Mapping[int, str]
) -> dict[str, Any]:
    """The part of a merged optimizer state that belongs to this stage's optimizer, ready for its ``load_state_dict``.

    Args:
        saved: what :func:`merge_optimizer_states` gave.
        groups: parameter names of each group.
        optimizer: over this stage's parameters.
        names: ``id`` of a parameter to its name.

    Raises:
        ConfigurationError: if the number of parameter groups differs.
    """
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise ConfigurationError(
            f"The checkpoint's optimizer has {len(saved['param_groups'])} parameter groups, configure_optimizers made"
            f" {len(optimizer.param_groups)}. Resume with the optimizer that was saved, or load the weights only."
        )
    number = {name: index for index, name in enumerate(name for group in groups for name in group)}
    state, param_groups, mine = {}, [], 0
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups):
        indices = range(mine, mine + len(group["params"]))
        mine += len(indices)
        for index, parameter in zip(indices, group["params"]):
            entry = saved["state"].get(number[names[id(parameter)]])
            if entry is not None:
                state[index] = entry
        named = {"param_names": group["param_names"]} if "param_names" in group else {}
        param_groups.append({**saved_group, **named, "params": list(indices)})
    return {"state": state, "param_groups": param_groups}
