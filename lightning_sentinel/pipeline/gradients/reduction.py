"""From the gradients of a stage's workers to the gradient of the step, by healthy workers alone.

Every worker holds sums over the micro-batches that it served, weighted so that the mean over all lanes is the gradient of the
batch: ``sum over workers / lanes / share`` is the step's gradient, where ``share`` is the part of the data that was not excluded.
In what follows ``divisor`` is ``lanes * share``.

Workers that served nothing have no gradients. They take part all the same, because they need the result.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sentinel.aggregation.rules import COORDINATE_WISE, WEIGHING, combine, tolerable
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.gradients.groups import require_healthy
from lightning_sentinel.pipeline.processes import wire

__all__ = ["clip_by_global_norm", "reduce_mean", "reduce_robustly", "sum_over_stages"]

_MEGABYTE = 2**20
_LARGE = 1 / 8
"""From this part of a message on, a gradient has one for itself: two copies cost more than another message."""


@torch.no_grad()
def reduce_mean(
    parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, divisor: float, *, bucket_bytes: int = 32 * _MEGABYTE
) -> None:
    """Replace every gradient by its sum over the group, divided by ``divisor``.

    A gradient that is missing on some ranks counts as zeros there; one that is missing on all ranks stays missing, so that the
    optimizer passes its parameter over.

    Args:
        parameters: the same on all ranks of the group. Those that are not trained are passed over.
        group: of :class:`StageGroups`.
        divisor: lanes times the share of the data that was not excluded.
        bucket_bytes: gradients are sent in messages of at most so many bytes, each of one dtype.
    """
    if group.size() == 1:
        gradients = [parameter.grad for parameter in parameters if parameter.requires_grad and parameter.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, divisor)
        return
    buckets = _Buckets(parameters, bucket_bytes)
    for number in range(len(buckets)):
        message = buckets.message(number)
        wire.all_reduce(message, group)
        buckets.store(number, message.div_(divisor))
    buckets.finish()


@torch.no_grad()
def reduce_robustly(
    parameters: Iterable[nn.Parameter],
    group: dist.ProcessGroup,
    divisor: float,
    weights: Sequence[float],
    rule: str,
    *,
    tolerated: int | None = None,
    bucket_bytes: int = 4 * _MEGABYTE,
) -> None:
    """Replace every gradient by a robust mean over the workers of the group, of which a minority may send anything.

    Worker ``i`` sends ``g_i``, the sum over its own work, a part ``w_i / sum(w)`` of all. The rule is applied to
    ``x_i = g_i * sum(w) / (w_i * divisor)``, which is the step's gradient as that worker alone would estimate it: the scale of
    accumulated batches is that of :func:`reduce_mean`, and the mean of all ``x_i``, weighted by ``w_i``, is exactly its result.
    Rules know no weights: whoever has worked at all has one vote.

    No rank holds more than one bucket of each worker. Krum, multi-Krum and centred clipping send everything twice: they know how to
    weigh whom once they have seen all. Who sends something else the second time has no weight from that bucket on.

    All ranks compute the result for themselves from the same bits, so replicas stay equal as long as their devices are of one kind.

    Args:
        parameters: the same on all ranks of the group, on one device. Those that are not trained are passed over.
        group: of :class:`StageGroups`.
        divisor: lanes times the share of the data that was not excluded.
        weights: how much data each member of the group served, in the order of the group and in any unit. Those with 0 served
            nothing and have no vote.
        rule: a name in :data:`lightning_sentinel.aggregation.rules.COORDINATE_WISE` or ``WEIGHING``.
        tolerated: how many may send anything; ``None``, and at most: fewer than half of those that served something.
        bucket_bytes: each worker's gradients are sent in messages of at most so many bytes, each of one dtype.

    Raises:
        ConfigurationError: if there is no such rule.
        ValueError: if ``weights`` does not fit the group, or nobody served anything.
    """
    votes = _Votes(group, divisor, weights)
    f = tolerable(len(votes.voters), tolerated, rule)
    buckets = _Buckets(parameters, bucket_bytes)
    if rule in COORDINATE_WISE:
        for number, seen, rows in votes.gather(buckets):
            buckets.store(number, torch.cat((seen, COORDINATE_WISE[rule](rows, f))))
    elif rule in WEIGHING:
        # Honest gradients are close to each other, and their distances are what is left of the difference of large numbers.
        gram: Tensor | float = 0.0
        checks = _Checksums()
        for _, _, rows in votes.gather(buckets):
            gram = gram + rows.double() @ rows.double().T
            checks.remember(rows)
        if isinstance(gram, Tensor):
            for number, seen, rows in votes.gather(buckets):
                gram = gram.masked_fill(checks.changed(rows), torch.nan)
                buckets.store(number, torch.cat((seen, combine(rows, WEIGHING[rule](gram, f)))))
    else:
        raise ConfigurationError(f"rule={rule!r} is unknown: choose one of {sorted(COORDINATE_WISE | WEIGHING)}.")
    buckets.finish()


@torch.no_grad()
def sum_over_stages(
    parameters: Iterable[nn.Parameter],
    group: dist.ProcessGroup,
    speakers: Sequence[int],
    *,
    bucket_bytes: int = 32 * _MEGABYTE,
) -> None:
    """Replace every gradient by the sum over stages, of each of which one rank says what it is.

    All ranks add the same numbers in the same order, so copies on different ranks get the same bits.

    Args:
        parameters: the same on all ranks of the group. Those that are not trained are passed over.
        group: of :meth:`StageGroups.across`.
        speakers: a rank of each stage, whose gradients have been reduced.
        bucket_bytes: gradients are sent in messages of at most so many bytes, each of one dtype.
    """
    buckets = _Buckets(parameters, bucket_bytes)
    for number in range(len(buckets)):
        mine = buckets.message(number)
        total = torch.zeros_like(mine)
        for speaker in speakers:
            said = mine.clone() if speaker == dist.get_rank() else torch.empty_like(mine)
            wire.broadcast(said, speaker, group)
            total += said
        buckets.store(number, total)
    buckets.finish()


@torch.no_grad()
def clip_by_global_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    mesh: Mesh,
    banned: Collection[Worker],
    device: torch.device,
    counted_elsewhere: Collection[int] = (),
) -> Tensor:
    """Scale the gradients of all stages so that their common norm is at most ``max_norm``, as ``clip_grad_norm_`` does.

    All ranks take part, banned ones included, after the gradients of the stages have been reduced. Of each stage the norm that its
    first healthy rank reports counts, so what a banned rank reports counts nowhere.

    Args:
        parameters: of this rank's stage.
        max_norm: what the norm of all stages' gradients may be.
        mesh: all workers, one a rank.
        banned: workers that nobody believes, the same on all ranks.
        device: of this rank; a stage may have no parameters that would tell.
        counted_elsewhere: parameters, by ``id``, that another stage has as well and counts.

    Returns:
        the norm before clipping, over all stages: a float64 scalar on ``device``, not waited for.

    Raises:
        MeshExhaustedError: on all ranks, if a stage has no healthy worker.
    """
    healthy = [[rank for rank in mesh.stage_ranks(stage) if mesh.worker(rank) not in banned] for stage in range(mesh.stages)]
    require_healthy(healthy)
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    counted = [p.grad for p in parameters if p.grad is not None and id(p) not in counted_elsewhere]
    squared = torch.zeros(1, dtype=torch.float64, device=device)
    # The norm of half-precision gradients may be too large for half precision.
    dtype = functools.reduce(torch.promote_types, {gradient.dtype for gradient in gradients}, torch.float32)
    if counted:
        squared += torch.stack(torch._foreach_norm(counted, 2.0, dtype=dtype)).double().square().sum()
    reported = wire.all_gather(squared)
    norm = torch.stack([reported[ranks[0], 0] for ranks in healthy]).sum().sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(dtype))
    return norm


class _Votes:
    """Everybody's gradients, on every rank, as far as they count."""

    def __init__(self, group: dist.ProcessGroup, divisor: float, weights: Sequence[float]) -> None:
        if len(weights) != group.size() or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(
                f"weights={list(weights)} does not fit a group of {group.size()} workers: give what each of them served, at"
                " least 0."
            )
        self.voters = [place for place, weight in enumerate(weights) if weight > 0]
        if not self.voters:
            raise ValueError(f"weights={list(weights)}: nobody served anything, so there is no gradient. Skip the step.")
        self._group = group
        self._scales = [sum(weights) / (weights[voter] * divisor) for voter in self.voters]

    def gather(self, buckets: _Buckets) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each bucket its number, whether any voter has each gradient ``(head,)``, and the estimates ``(voters, values)``."""
        for number in range(len(buckets)):
            message = buckets.message(number)
            everyone = wire.all_gather(message, self._group)
            votes = everyone if len(self.voters) == len(everyone) else everyone[self.voters]
            votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
            heads, rows = votes.tensor_split([buckets.head(number)], dim=1)
            # Compared one by one: a sum with something that is not a number would deny the gradients of everybody.
            seen = (heads > 0).any(dim=0).to(rows.dtype)
            yield number, seen, rows.mul_(rows.new_tensor(self._scales)[:, None])


class _Checksums:
    """Tells whether rows come again as they were, bit by bit, without keeping them.

    Each is a sum of the row's bits times numbers that this rank has drawn for itself, so that nobody can aim at them; and exact,
    so that ranks with other numbers tell the same.
    """

    def __init__(self) -> None:
        self._seed = secrets.randbits(62)
        self._remembered: list[Tensor] = []
        self._again = 0

    def remember(self, rows: Tensor) -> None:
        self._remembered.append(self._of(rows, len(self._remembered)))

    def changed(self, rows: Tensor) -> Tensor:
        """Of the same rows once more, in the same order: pairs ``(voters, voters)`` bool of which one or both are others."""
        others = self._of(rows, self._again) != self._remembered[self._again]
        self._again += 1
        return others[:, None] | others

    def _of(self, rows: Tensor, number: int) -> Tensor:
        generator = torch.Generator(rows.device).manual_seed(self._seed + number)
        size = torch.iinfo(torch.int64)
        factors = torch.randint(size.min, size.max, rows.shape[1:], generator=generator, device=rows.device)
        bits = torch.int64 if rows.dtype == torch.float64 else torch.int32
        return torch.stack([(row.view(bits) * factors).sum() for row in rows])


class _Buckets:
    """Gradients in messages of a limited size, so that a few messages do for many parameters and a large one needs little room.

    Small gradients share a message, which is a copy of them. A large one is sent from where it is.
    The first message begins with its *head*, which says which gradients this rank has.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], size: int) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._present = [parameter.grad is not None for parameter in self._parameters]
        self._gradients = [
            torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            if parameter.grad is None
            else parameter.grad.contiguous()
            for parameter in self._parameters
        ]
        self._pieces = _packed(self._gradients, size)
        self._anywhere: Tensor | None = None

    def __len__(self) -> int:
        return len(self._pieces)

    def head(self, number: int) -> int:
        return len(self._present) if number == 0 else 0

    def message(self, number: int) -> Tensor:
        """What this rank sends: its gradients themselves where it can be, so nobody may change it before it is stored."""
        head, pieces = self.head(number), self._pieces[number]
        if not head and len(pieces) == 1:
            return pieces[0]
        return torch.cat([pieces[0].new_tensor(self._present[:head]), *pieces])

    def store(self, number: int, message: Tensor) -> None:
        """Write a message's values to the gradients; its head says which there are on any rank, by being above zero."""
        if message is self._pieces[number][0]:
            return
        head, *parts = message.split([self.head(number), *map(len, self._pieces[number])])
        if number == 0:
            self._anywhere = head
        torch._foreach_copy_(self._pieces[number], parts)

    def finish(self) -> None:
        """Give the parameters their gradients."""
        # The host waits for an answer only where there is a question.
        ask = self._anywhere is not None and not all(self._present)
        anywhere = (self._anywhere > 0).tolist() if ask and self._anywhere is not None else self._present
        for parameter, gradient, present in zip(self._parameters, self._gradients, anywhere):
            parameter.grad = gradient if present else None


def _packed(gradients: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """Flat views of contiguous gradients, in lists of one dtype and device and of at most ``size`` bytes; small ones first."""
    closed: list[list[Tensor]] = []
    alone: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        kind, room = (gradient.dtype, gradient.device), max(1, size // gradient.element_size())
        for piece in gradient.view(-1).split(room):
            if len(piece) >= room * _LARGE:
                alone.append([piece])
                continue
            if sum(map(len, filling.get(kind, ()))) + len(piece) > room:
                closed.append(filling.pop(kind))
            filling.setdefault(kind, []).append(piece)
    return [*closed, *filling.values(), *alone]
