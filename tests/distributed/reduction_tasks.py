"""What ranks do with gradients that can be made again anywhere; imported by ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sentinel.aggregation.rules import WEIGHING
from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.gradients.groups import StageGroups
from lightning_sentinel.pipeline.gradients.reduction import _Buckets, clip_by_global_norm, reduce_mean, reduce_robustly
from lightning_sentinel.pipeline.processes.liveness import connect

MESH = Mesh(stages=2, replicas=3)
DIVISOR = 3 * 0.75
PATIENCE = timedelta(seconds=17)
SHAPES = {"weight": (40, 30), "bias": (30,), "scalar": (), "half": (9, 3), "sometimes": (6,), "unused": (4, 4), "frozen": (3,)}
SMALL, LARGE = 512, 2**20
"""Bytes of a bucket: ``weight`` alone takes ten of the small ones."""


Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Case:
    """Who served how much of the data, and what the liar among them sends."""

    weights: tuple[float, float, float]
    liar: int | None = None
    lie: float = 0.0


CASES = {
    "equal": Case((1.0, 1.0, 1.0)),
    "unequal": Case((1.0, 2.0, 0.5)),
    "idle": Case((1.5, 0.0, 1.5)),
    "alone": Case((0.0, 0.0, 2.0)),
    "large": Case((1.0, 1.0, 1.0), liar=1, lie=1e30),
    "not a number": Case((1.0, 2.0, 1.0), liar=0, lie=torch.nan),
}


def gradients(rank: int, case: Case) -> dict[str, Tensor | None]:
    """A common direction and some noise, times the data served. ``sometimes`` is used by the last replica only."""
    worker = MESH.worker(rank)
    weight = case.weights[worker.replica]
    common = torch.Generator().manual_seed(100 + worker.stage)
    own = torch.Generator().manual_seed(rank)
    found: dict[str, Tensor | None] = {}
    for name, shape in SHAPES.items():
        value = weight * (torch.randn(shape, generator=common) + 0.3 * torch.randn(shape, generator=own))
        if worker.replica == case.liar:
            value = torch.full(shape, case.lie)
        missing = weight == 0 or name in ("unused", "frozen") or (name == "sometimes" and worker.replica != 2)
        found[name] = None if missing else value.to(torch.bfloat16 if name == "half" else torch.float32)
    return found


def module(rank: int, case: Case) -> Parameters:
    """Parameters with these gradients, one of which is not contiguous."""
    parameters: Parameters = {}
    for name, gradient in gradients(rank, case).items():
        dtype = torch.bfloat16 if name == "half" else torch.float32
        parameters[name] = nn.Parameter(torch.zeros(SHAPES[name], dtype=dtype), requires_grad=name != "frozen")
        parameters[name].grad = gradient.T.contiguous().T if gradient is not None and gradient.ndim == 2 else gradient
    return parameters


def results(parameters: Parameters) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in parameters.items()}


@contextmanager
def message_sizes() -> Iterator[list[int]]:
    """Bytes of the messages with gradients that this rank sends."""
    sizes: list[int] = []
    with (
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced,
        patch.object(dist, "all_gather", wraps=dist.all_gather) as gathered,
    ):
        yield sizes
    sent = [call.args[0] for call in reduced.call_args_list] + [call.args[1] for call in gathered.call_args_list]
    sizes.extend(message.numel() * message.element_size() for message in sent)


def everything(rules: list[str]) -> dict[str, Any]:
    """All that :mod:`lightning_sentinel.pipeline.gradients.reduction` does, on one rank of a mesh of 2 x 3."""
    rank = int(os.environ["LOCAL_RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connect("gloo", address=address, port=port, rank=rank, world_size=MESH.size, timeout=timedelta(seconds=30))
    groups = StageGroups(MESH, rank, PATIENCE)
    answer = {"means": means(groups, rank), "robust": robust(groups, rank, rules), "groups": membership(groups, rank)}
    answer["clipped"] = clipped(groups, rank)
    answer["in place"], answer["by itself"] = in_place(groups, rank), by_itself(groups, rank)
    dist.destroy_process_group()
    return answer


def means(groups: StageGroups, rank: int) -> dict[Any, Any]:
    group, found = groups.healthy(frozenset()), {}
    for name, case in CASES.items():
        for size in (SMALL, LARGE):
            parameters = module(rank, case)
            with message_sizes() as sizes:
                reduce_mean(parameters.values(), group, DIVISOR, bucket_bytes=size)
            found[name, size] = results(parameters), sizes
    return found


def in_place(groups: StageGroups, rank: int) -> dict[str, int]:
    """How many messages are memory of each gradient, and not copies of it."""
    parameters, group = module(rank, CASES["equal"]), groups.healthy(frozenset())
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        reduce_mean(parameters.values(), group, DIVISOR, bucket_bytes=SMALL)
    sent = [call.args[0].untyped_storage().data_ptr() for call in reduced.call_args_list]
    return {
        name: sent.count(gradient.untyped_storage().data_ptr())
        for name, gradient in results(parameters).items()
        if gradient is not None
    }


def by_itself(groups: StageGroups, rank: int) -> Any:
    """What is left of a stage's only healthy worker's gradients, and the messages that it sent."""
    group = groups.healthy({Worker(stage, replica) for stage in range(2) for replica in (0, 1)})
    parameters = module(rank, CASES["equal"])
    parameters["frozen"].grad = torch.ones(SHAPES["frozen"])
    with message_sizes() as sizes:
        if group is not None:
            reduce_mean(parameters.values(), group, DIVISOR)
    return results(parameters), sizes


def robust(groups: StageGroups, rank: int, rules: list[str]) -> dict[Any, Any]:
    group, found = groups.healthy(frozenset()), {}

    def reduce(parameters: Parameters, weights: tuple[float, ...], rule: str, size: int = LARGE) -> None:
        reduce_robustly(parameters.values(), group, DIVISOR, weights, rule, bucket_bytes=size)

    for rule in rules:
        for name, case in CASES.items():
            for size in (SMALL, LARGE):
                parameters = module(rank, case)
                with message_sizes() as sizes:
                    reduce(parameters, case.weights, rule, size)
                found[rule, name, size] = results(parameters), sizes
    # A liar that sends nothing but what is not a number, instead of which gradients it has as well.
    parameters, message = module(rank, CASES["equal"]), _Buckets.message
    with patch.object(_Buckets, "message", lambda *args: message(*args) * (torch.nan if rank % 3 == 0 else 1.0)):
        reduce(parameters, (1.0, 1.0, 1.0), "krum")
    found["no head"] = results(parameters)
    for rule in WEIGHING:
        found["two faces", rule] = two_faced(rank, lambda parameters, rule=rule: reduce(parameters, (1.0, 1.0, 1.0), rule, SMALL))
    for name, weights, rule in (("short", (1.0, 1.0), "krum"), ("nobody", (0.0, 0.0, 0.0), "krum"), ("typo", (1.0,) * 3, "crumb")):
        try:
            reduce(module(rank, CASES["equal"]), weights, rule)
        except ValueError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def two_faced(rank: int, reduce: Callable[[Parameters], None]) -> dict[str, Tensor | None]:
    """The first replica sends what is near to all others', and when it is weighed something else."""
    parameters, message, seen = module(rank, CASES["equal"]), _Buckets.message, set()
    if rank % 3 == 0:
        honest = [module(other, CASES["equal"]) for other in MESH.stage_ranks(MESH.worker(rank).stage)]
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad = torch.stack([replica[name].grad for replica in honest if replica[name].grad is not None]).mean(
                    dim=0
                )

    def sent(buckets: _Buckets, number: int) -> Tensor:
        again = rank % 3 == 0 and number in seen
        seen.add(number)
        return message(buckets, number) * (-100.0 if again else 1.0)

    with patch.object(_Buckets, "message", sent):
        reduce(parameters)
    return results(parameters)


def membership(groups: StageGroups, rank: int) -> list[Any]:
    """Members of this rank's group, its sum over their ranks, and how many groups there are, as workers are banned and return."""
    found, before = [], groups.healthy(frozenset())
    for banned in ({Worker(0, 1)}, {Worker(0, 1)}, {Worker(0, 1), Worker(1, 0), Worker(1, 2)}, {Worker(1, 2)}, set()):
        group = groups.healthy(frozenset(banned))
        total = torch.tensor(float(rank))
        if group is not None:
            group.all_reduce(total)
        found.append(
            {
                "members": None if group is None else dist.get_process_group_ranks(group.group),
                "total": total.item(),
                "new": group is not before,
                "groups": len(dist.distributed_c10d._world.pg_map),
                "timeout": None if group is None else group.group._get_backend(torch.device("cpu")).options._timeout,
            }
        )
        before = group
    try:
        groups.healthy({Worker(1, replica) for replica in range(3)})
    except MeshExhaustedError as error:
        found.append(str(error))
    return found


def clipped(groups: StageGroups, rank: int) -> dict[float, Any]:
    """Norms and gradients, where the first rank, which is banned, claims what is not a number."""
    found, banned = {}, frozenset({Worker(1, 0)})
    for max_norm in (0.5, 1e9):
        group, parameters = groups.healthy(banned), module(rank, CASES["equal"])
        if group is not None:
            reduce_mean(parameters.values(), group, DIVISOR)
        else:
            for parameter in parameters.values():
                parameter.grad = torch.full_like(parameter, torch.nan)
        before = {name: None if value is None else value.clone() for name, value in results(parameters).items()}
        norm = clip_by_global_norm(parameters.values(), max_norm, MESH, banned, torch.device("cpu"))
        found[max_norm] = before, norm, results(parameters)
    return found
