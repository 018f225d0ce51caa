"""Merges the state dicts and optimizer states of all stages into one ordinary Lightning checkpoint, and splits one again.

The file has the keys of the unsplit module and an optimizer state in torch's own format, so that ``load_from_checkpoint`` and a run
on one process can read it. Stages send their part to rank zero as JSON and tensors, never as pickled objects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.messages.tensor_trees import receive_tree, send_tree
from lightning_sentinel.pipeline.processes.wire import is_connected, world

__all__ = [
    "SECTION",
    "StageState",
    "collect",
    "group_names",
    "in_order",
    "join_optimizer_parts",
    "merge_optimizer_states",
    "optimizer_of",
    "optimizer_part",
    "own_optimizer_state",
    "own_part",
    "select_state",
    "speakers",
]

SECTION = "lightning_sentinel"
"""Key of our section in a checkpoint."""

_LIKE_THE_PARAMETER = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer"})
"""Optimizer states of torch that have the shape of their parameter."""

StageState = tuple[dict[str, Any], dict[str, Tensor]]


def speakers(mesh: Mesh, banned: Collection[Worker] = ()) -> list[int]:
    """The rank that saves the state of each stage.

    Args:
        mesh: all workers.
        banned: workers that are avoided, because their weights are not kept up to date.

    Example:
        >>> speakers(Mesh(stages=3, replicas=2), {Worker(1, 0)})
        [4, 3, 0]
    """
    stages = [mesh.stage_ranks(stage) for stage in range(mesh.stages)]
    return [next((r for r in ranks if mesh.worker(r) not in banned), ranks[0]) for ranks in stages]


def collect(
    plain: Mapping[str, Any], tensors: Mapping[str, Tensor], ranks: Sequence[int], most_bytes: int | None = None, to: int = 0
) -> list[StageState]:
    """Gather the parts of a checkpoint on one rank; to be called by all ranks. A single process returns its own part.

    Args:
        plain: the entries of this rank's part that JSON can represent.
        tensors: the tensors of this rank's part.
        ranks: ranks that have a part.
        most_bytes: limit on the size of a part; ``None`` is the machine's free memory.
        to: the rank that receives the parts; it need not be one of ``ranks``.

    Returns:
        on rank ``to`` the parts, in the order of ``ranks``, on the host; elsewhere an empty list.

    Raises:
        MalformedMessageError: if a rank sends no valid part.
    """
    mine = (dict(plain), {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    if not is_connected():
        return [mine]
    rank = world().rank
    if rank != to:
        if rank in ranks:
            send_tree(mine, to)
        return []
    return [mine if speaker == to else _part_from(speaker, most_bytes) for speaker in ranks]


def _part_from(rank: int, most_bytes: int | None) -> StageState:
    found = receive_tree(rank, most_bytes)
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(one, dict) for one in found):
        plain, tensors = found
        names = all(isinstance(name, (str, int)) for name in (*plain, *tensors))
        if names and all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            return plain, tensors
    raise MalformedMessageError(f"Rank {rank} sent no part of a checkpoint: {str(found)[:80]}.", rank=rank)


def own_part(part: StageState, names: Collection[str], rank: int) -> StageState:
    """Restrict a received optimizer part to the sender's own parameters, and check that it has the form of :func:`optimizer_part`.

    Raises:
        MalformedMessageError: if the part has another form.

    Example:
        >>> import torch
        >>> plain = {"groups": [["a", "b"]], "numbers": [], "options": [{"lr": 0.1}]}
        >>> own_part((plain, {"a/mean": torch.ones(1), "b/mean": torch.ones(1)}), {"b"}, rank=0)
        ({'groups': [['b']], 'numbers': [], 'options': [{'lr': 0.1}]}, {'b/mean': tensor([1.])})
    """
    plain, _ = part
    try:
        groups, numbers, options = (plain[name] for name in ("groups", "numbers", "options"))
        named = all(isinstance(name, str) for group in groups for name in group)
        counted = all(isinstance(name, str) and isinstance(key, str) and _is_plain(value) for name, key, value in numbers)
        said = all(isinstance(one, dict) and _is_plain(list(one.values())) for one in options)
        if named and counted and said and len(options) == len(groups):
            return optimizer_of(part, names)
    except (KeyError, TypeError, ValueError):
        pass
    raise MalformedMessageError(f"Rank {rank} sent no optimizer state: {str(plain)[:80]}.", rank=rank)


def in_order(names: Collection[str], known: Sequence[str]) -> list[str]:
    """Sort the present keys of a module into the order of the unsplit module.

    Args:
        names: the present keys.
        known: all keys of the unsplit module when it was split, in order. A new key, as pruning makes when it replaces a parameter,
            is sorted behind the known keys of its submodule.

    Example:
        >>> in_order(["b.weight", "a.weight_mask", "a.weight_orig", "a.bias"], ["a.weight", "a.bias", "b.weight"])
        ['a.bias', 'a.weight_mask', 'a.weight_orig', 'b.weight']
    """
    position = {name: index for index, name in enumerate(known)}
    last: dict[str, int] = {}
    for name, index in position.items():
        last |= dict.fromkeys(_owners(name), index)

    def place(name: str) -> tuple[int, bool]:
        if name in position:
            return position[name], False
        return next((last[owner] for owner in _owners(name) if owner in last), len(known)), True

    return sorted(names, key=place)


def _owners(name: str) -> list[str]:
    """The names of the modules that contain an entry, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1)]


def select_state(
    state: Mapping[str, Any], module: nn.Module, known: Sequence[str], strict: bool, saved: Collection[str] | None = None
) -> dict[str, Any]:
    """Select the entries of an unsplit ``state_dict`` that belong to this stage.

    Args:
        state: of the unsplit module, or the entries of it that were read.
        module: this stage's part of the module.
        known: all keys of the unsplit module.
        strict: whether the keys must match exactly; checked for the whole module, so that all ranks agree.
        saved: all keys of the checkpoint, if ``state`` has only some.

    Raises:
        ConfigurationError: if ``strict`` and the keys differ.
    """
    saved = set(state if saved is None else saved)
    missing = sorted(set(known) - saved)
    unexpected = sorted(saved - set(known))
    if strict and (missing or unexpected):
        raise ConfigurationError(
            f"The checkpoint does not fit {type(module).__name__}: {len(missing)} key(s) missing (first: {missing[:3]}),"
            f" {len(unexpected)} unexpected (first: {unexpected[:3]}). Build the module with the arguments that it was saved with."
        )
    return {name: state[name] for name in module.state_dict() if name in state}


def optimizer_part(optimizer: Optimizer, names: Mapping[int, str]) -> StageState:
    """This stage's optimizer state, by parameter name.

    Args:
        optimizer: over this stage's parameters.
        names: ``id`` of a parameter to its name in the unsplit module.

    Raises:
        ConfigurationError: if the optimizer has a parameter without a name.
    """
    unknown = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if unknown:
        raise ConfigurationError(
            f"{type(optimizer).__name__} has {len(unknown)} parameter(s) that were not the module's when the run started (first: of"
            f" shape {tuple(unknown[0].shape)}), so a checkpoint has no name for their state. Make all parameters in __init__,"
            " configure_model or setup."
        )
    plain: dict[str, Any] = {"groups": [], "numbers": [], "options": []}
    tensors = {}
    for group in optimizer.param_groups:
        plain["options"].append({key: value for key, value in group.items() if key != "params" and _is_plain(value)})
        plain["groups"].append([names[id(parameter)] for parameter in group["params"]])
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{names[id(parameter)]}/{key}"] = value
                else:
                    plain["numbers"].append([names[id(parameter)], key, value])
    return plain, tensors


def join_optimizer_parts(parts: Sequence[StageState]) -> StageState:
    """Join the optimizer parts of one stage's workers, which hold the state of different parameters.

    Example:
        >>> import torch
        >>> groups = [["a", "b"]]
        >>> mine = ({"groups": groups, "numbers": []}, {"a/mean": torch.ones(1)})
        >>> yours = ({"groups": groups, "numbers": [["b", "seen", 3]]}, {})
        >>> join_optimizer_parts([mine, yours])
        ({'groups': [['a', 'b']], 'numbers': [['b', 'seen', 3]]}, {'a/mean': tensor([1.])})
    """
    numbers = [entry for plain, _ in parts for entry in plain["numbers"]]
    return {**parts[0][0], "numbers": numbers}, {path: tensor for _, tensors in parts for path, tensor in tensors.items()}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def optimizer_of(part: StageState, parameters: Collection[str]) -> StageState:
    """Restrict an optimizer part to some parameters.

    Example:
        >>> import torch
        >>> plain = {"groups": [["a", "b"]], "numbers": [["b", "seen", 3]], "options": [{"lr": 0.1}]}
        >>> optimizer_of((plain, {"a/mean": torch.ones(1)}), {"b"})
        ({'groups': [['b']], 'numbers': [['b', 'seen', 3]], 'options': [{'lr': 0.1}]}, {})
    """
    plain, tensors = part
    chosen = {
        "groups": [[name for name in group if name in parameters] for group in plain["groups"]],
        "numbers": [entry for entry in plain["numbers"] if entry[0] in parameters],
        "options": plain["options"],
    }
    return chosen, {path: tensor for path, tensor in tensors.items() if path.rsplit("/", 1)[0] in parameters}


def merge_optimizer_states(
    parts: Sequence[StageState], options: Sequence[Mapping[str, Any]], order: Sequence[str]
) -> tuple[dict[str, Any], list[list[str]]]:
    """Merge the optimizer states of all stages into one in torch's format.

    Args:
        parts: the result of :func:`optimizer_part` on each stage.
        options: of each parameter group of one stage, without its parameters. Another stage may have more groups, if a callback
            added a layer's parameters; their options come from that stage's part, which has only the plain ones.
        order: parameter names of the unsplit module.

    Returns:
        the state, with parameters numbered group by group in ``order``, and the parameter names of each group.
    """
    position = {name: index for index, name in enumerate(order)}
    most: list[dict[str, Any]] = max((plain["options"] for plain, _ in parts), key=len, default=[])
    options = [*options, *most[len(options) :]]
    groups = [
        sorted({n for plain, _ in parts for names in plain["groups"][index : index + 1] for n in names}, key=position.__getitem__)
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
        # If made from named_parameters(), a group lists parameter names, on each stage only that stage's.
        named = {"param_names": group} if "param_names" in option else {}
        param_groups.append({**option, **named, "params": [number[name] for name in group]})
    return {"state": dict(sorted(state.items())), "param_groups": param_groups}, groups


def own_optimizer_state(
    saved: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    optimizer: Optimizer,
    names: Mapping[int, str],
    others: Collection[int] = (),
) -> dict[str, Any]:
    """Select this stage's part of a merged optimizer state, ready for its optimizer's ``load_state_dict``.

    Args:
        saved: the merged state, from :func:`merge_optimizer_states`.
        groups: parameter names of each group.
        optimizer: over this stage's parameters.
        names: ``id`` of a parameter to its name.
        others: parameters, by ``id``, whose state another rank keeps.

    Raises:
        ConfigurationError: if the number of parameter groups differs, or a state has not the shape of its parameter.
    """
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise ConfigurationError(
            f"The checkpoint's optimizer has {len(saved['param_groups'])} parameter groups, configure_optimizers made"
            f" {len(optimizer.param_groups)}. Resume with the optimizer that was saved, or load the weights only."
        )
    number = {name: index for index, name in enumerate(name for group in groups for name in group)}
    state = {}
    param_groups = []
    mine = 0
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups):
        indices = range(mine, mine + len(group["params"]))
        mine += len(indices)
        for index, parameter in zip(indices, group["params"]):
            entry = saved["state"].get(number[names[id(parameter)]])
            if entry is not None:
                _require_shape(entry, parameter, names[id(parameter)])
            if entry is not None and id(parameter) not in others:
                # Copy: the tensors may be a memory-mapped file.
                state[index] = {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
        named = {"param_names": group["param_names"]} if "param_names" in group else {}
        param_groups.append({**saved_group, **named, "params": list(indices)})
    return {"state": state, "param_groups": param_groups}


def _require_shape(entry: Mapping[str, Any], parameter: nn.Parameter, name: str) -> None:
    for key in _LIKE_THE_PARAMETER & entry.keys():
        value = entry[key]
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ConfigurationError(
                f"In the checkpoint's optimizer state the {key} of {name} has the shape {tuple(value.shape)}, the parameter has"
                f" {tuple(parameter.shape)}: the optimizer was given its parameters in another order, or the model is another."
                " Resume with the model and optimizer that were saved, or load the weights only, with load_from_checkpoint."
            )


def group_names(saved: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[list[str]]:
    """Find the names of the numbered parameters in an optimizer state that was saved from an unsplit module.

    Args:
        saved: the optimizer state, in torch's format.
        parts: of each stage, the ``"groups"`` of its optimizer: parameter names, in the optimizer's order.
        order: parameter names of the unsplit module.

    Returns:
        the names in each group, in the order of the numbers.

    Raises:
        ConfigurationError: if the groups differ, or the order of a group's parameters is unknown.
    """
    groups = saved["param_groups"]
    here = [{name for part in parts for name in part["groups"][index]} for index in range(len(parts[0]["groups"]))]
    if [len(group["params"]) for group in groups] != [len(names) for names in here]:
        raise ConfigurationError(
            f"The checkpoint's optimizer has parameter groups of {[len(group['params']) for group in groups]} parameters,"
            f" configure_optimizers made groups of {[len(names) for names in here]}. Resume with the optimizer that was saved, or"
            " load the weights only, with load_from_checkpoint."
        )
    position = {name: index for index, name in enumerate(order)}
    found = []
    for index, (group, names) in enumerate(zip(groups, here)):
        if set(group.get("param_names", ())) == names:
            found.append(list(group["param_names"]))
            continue
        for part in parts:
            mine = part["groups"][index]
            if mine != sorted(mine, key=position.__getitem__):
                raise ConfigurationError(
                    f"Group {index} of the optimizer has its parameters in an order of its own (first: {mine[:3]}), and the"
                    " checkpoint, which was not written by SentinelStrategy, does not name them. Give the optimizer"
                    " named_parameters(), or parameters in the module's order, or load the weights only."
                )
        found.append(sorted(names, key=position.__getitem__))
    return found
