"""Gradient reduction within a stage, over workers that are not banned.

Each worker's gradient is a sum over the micro-batches that it served, weighted so that the mean over all lanes is the gradient of
the batch. The step's gradient is ``sum over workers / lanes / fraction``, where ``fraction`` is the part of the data that was not
excluded. Below, ``divisor`` is ``lanes * fraction``.

Workers that served no micro-batch have no gradients. They take part all the same, because they need the result.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_sentinel.aggregation.rules import COORDINATE_WISE, WEIGHING, combine, tolerable
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.gradients.groups import require_healthy
from lightning_sentinel.pipeline.processes.wire import Wire, world

__all__ = ["clip_by_global_norm", "reduce_mean", "reduce_robustly", "sum_over_stages"]

_MEGABYTE = 2**20
_LARGE = 1 / 8
"""A gradient of at least this fraction of a message's limit gets its own message: two copies cost more than another message."""


@torch.no_grad()
def reduce_mean(parameters: Iterable[nn.Parameter], wire: Wire, divisor: float, *, bucket_bytes: int = 32 * _MEGABYTE) -> None:
    """Replace every gradient by its sum over the group, divided by ``divisor``.

    A gradient that is missing on some ranks counts as zeros there. One that is missing on all ranks stays missing, so that the
    optimizer skips its parameter.

    Args:
        parameters: the same on all ranks of the group. Frozen parameters are skipped.
        wire: the stage's, from :class:`StageGroups`.
        divisor: lanes times the fraction of the data that was not excluded.
        bucket_bytes: the size limit of a gradient bucket. Each bucket holds one dtype.
    """
    if wire.size == 1:
        gradients = [parameter.grad for parameter in parameters if parameter.requires_grad and parameter.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, divisor)
        return
    buckets = _Buckets(parameters, bucket_bytes)
    for number in range(len(buckets)):
        message = buckets.message(number)
        wire.all_reduce(message)
        buckets.store(number, message.div_(divisor))
    buckets.finish()


@torch.no_grad()
def reduce_robustly(
    parameters: Iterable[nn.Parameter],
    wire: Wire,
    divisor: float,
    weights: Sequence[float],
    rule: str,
    *,
    tolerated: int | None = None,
    bucket_bytes: int = 4 * _MEGABYTE,
) -> None:
    """Replace every gradient by a robust mean over the workers of the group, of which a minority may send anything.

    Worker ``i`` sends ``g_i``, the sum over its own micro-batches, which are ``w_i / sum(w)`` of the data. The rule is applied to
    ``x_i = g_i * sum(w) / (w_i * divisor)``, this worker's own estimate of the step's gradient. Accumulated batches scale as in
    :func:`reduce_mean`, whose result is exactly the mean of all ``x_i``, weighted by ``w_i``. Rules ignore these weights: each
    worker that served any data has one vote.

    No rank holds more than one bucket of each worker. Krum, multi-Krum and centred clipping gather every bucket twice: they can
    weigh workers only once they have seen all buckets. A worker whose second message differs has no weight from that bucket on.

    Each rank computes the result itself from the same bits, so replicas stay equal as long as their devices are of one kind.

    Args:
        parameters: the same on all ranks of the group, on one device. Frozen parameters are skipped.
        wire: the stage's, from :class:`StageGroups`.
        divisor: lanes times the fraction of the data that was not excluded.
        weights: how much data each member of the group served, in the order of the group and in any unit. Members with weight 0
            served no data and have no vote.
        rule: a name in :data:`lightning_sentinel.aggregation.rules.COORDINATE_WISE` or ``WEIGHING``.
        tolerated: how many workers may send anything; ``None``, and at most: fewer than half of those that served data.
        bucket_bytes: the size limit of each worker's gradient bucket. Each bucket holds one dtype.

    Raises:
        ConfigurationError: if there is no such rule.
        ValueError: if ``weights`` does not fit the group, or no member served data.
    """
    votes = _Votes(wire, divisor, weights)
    f = tolerable(len(votes.voters), tolerated, rule)
    buckets = _Buckets(parameters, bucket_bytes)
    if rule in COORDINATE_WISE:
        for number, seen, rows in votes.gather(buckets):
            buckets.store(number, torch.cat((seen, COORDINATE_WISE[rule](rows, f))))
    elif rule in WEIGHING:
        # In double precision: honest gradients are close, so their distances are small differences of large numbers.
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
    wire: Wire,
    speakers: Sequence[int],
    *,
    bucket_bytes: int = 32 * _MEGABYTE,
) -> None:
    """Replace every gradient by its sum over stages. One rank of each stage broadcasts the stage's gradient.

    All ranks add the same numbers in the same order, so copies on different ranks are equal bit for bit.

    Args:
        parameters: the same on all ranks of the group. Frozen parameters are skipped.
        wire: the stages', from :meth:`StageGroups.across`.
        speakers: one rank of each stage, which broadcasts gradients that have been reduced.
        bucket_bytes: the size limit of a gradient bucket. Each bucket holds one dtype.
    """
    buckets = _Buckets(parameters, bucket_bytes)
    for number in range(len(buckets)):
        mine = buckets.message(number)
        total = torch.zeros_like(mine)
        for speaker in speakers:
            said = mine.clone() if speaker == wire.rank else torch.empty_like(mine)
            wire.broadcast(said, speaker)
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

    All ranks take part, banned ones included, after the stages' gradients have been reduced. Each stage's norm is the one that its
    first healthy rank reports. What a banned rank reports counts nowhere.

    Args:
        parameters: the parameters of this rank's stage.
        max_norm: the largest allowed norm over all stages' gradients.
        mesh: all workers, one a rank.
        banned: workers whose reports do not count, the same on all ranks.
        device: this rank's device, because a stage may have no parameter to tell it.
        counted_elsewhere: parameters, by ``id``, that another stage shares and counts.

    Returns:
        the norm before clipping, over all stages: a float64 scalar on ``device``, for which the host does not wait.

    Raises:
        MeshExhaustedError: on all ranks, if a stage has no healthy worker.
    """
    healthy = [[rank for rank in mesh.stage_ranks(stage) if mesh.worker(rank) not in banned] for stage in range(mesh.stages)]
    require_healthy(healthy)
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    counted = [p.grad for p in parameters if p.grad is not None and id(p) not in counted_elsewhere]
    squared = torch.zeros(1, dtype=torch.float64, device=device)
    # At least float32: the norm of half-precision gradients may overflow half precision.
    dtype = functools.reduce(torch.promote_types, {gradient.dtype for gradient in gradients}, torch.float32)
    if counted:
        squared += torch.stack(torch._foreach_norm(counted, 2.0, dtype=dtype)).double().square().sum()
    reported = world().all_gather(squared)
    norm = torch.stack([reported[ranks[0], 0] for ranks in healthy]).sum().sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(dtype))
    return norm


class _Votes:
    """All-gathers each worker's gradient bucket, rescaled to an estimate of the full gradient."""

    def __init__(self, wire: Wire, divisor: float, weights: Sequence[float]) -> None:
        if len(weights) != wire.size or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(
                f"weights={list(weights)} does not fit a group of {wire.size} workers: give what each of them served, at least 0."
            )
        self.voters = [place for place, weight in enumerate(weights) if weight > 0]
        if not self.voters:
            raise ValueError(f"weights={list(weights)}: nobody served anything, so there is no gradient. Skip the step.")
        self._wire = wire
        self._scales = [sum(weights) / (weights[voter] * divisor) for voter in self.voters]

    def gather(self, buckets: _Buckets) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields each bucket's number, whether any voter has each gradient ``(head,)``, and the estimates ``(voters, values)``."""
        for number in range(len(buckets)):
            message = buckets.message(number)
            everyone = self._wire.all_gather(message)
            votes = everyone if len(self.voters) == len(everyone) else everyone[self.voters]
            votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
            heads, rows = votes.tensor_split([buckets.head(number)], dim=1)
            # Compared one by one: in a sum, one voter's NaN would hide the gradients of all voters.
            seen = (heads > 0).any(dim=0).to(rows.dtype)
            yield number, seen, rows.mul_(rows.new_tensor(self._scales)[:, None])


class _Checksums:
    """Tells whether workers send the same rows a second time, bit for bit, without keeping the rows.

    A checksum is the sum of a row's bits times random factors that only this rank knows, so that no worker can aim at it. Sums are
    exact, so that ranks with other factors come to the same answer.
    """

    def __init__(self) -> None:
        self._seed = secrets.randbits(62)
        self._remembered: list[Tensor] = []
        self._again = 0

    def remember(self, rows: Tensor) -> None:
        self._remembered.append(self._of(rows, len(self._remembered)))

    def changed(self, rows: Tensor) -> Tensor:
        """``(voters, voters)`` bool, whether the row of either differs from the remembered one; to be called in the same order."""
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
    """Gradients in messages of limited size, so that many parameters take few messages and a large one takes little memory.

    Small gradients are copied into a common message. A large gradient is sent from its own memory.
    The first message begins with a *head*: for each gradient, whether this rank has it.
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
        """The message that this rank sends. It may be a view of the gradients, so do not change it before :meth:`store`."""
        head = self.head(number)
        pieces = self._pieces[number]
        if not head and len(pieces) == 1:
            return pieces[0]
        return torch.cat([pieces[0].new_tensor(self._present[:head]), *pieces])

    def store(self, number: int, message: Tensor) -> None:
        """Write a reduced message to the gradients. Its head is above zero for each gradient that any rank has."""
        if message is self._pieces[number][0]:
            return
        head, *parts = message.split([self.head(number), *map(len, self._pieces[number])])
        if number == 0:
            self._anywhere = head
        torch._foreach_copy_(self._pieces[number], parts)

    def finish(self) -> None:
        """Set the parameters' gradients."""
        # The host waits for the head only if this rank lacks a gradient.
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
        kind = (gradient.dtype, gradient.device)
        room = max(1, size // gradient.element_size())
        for piece in gradient.view(-1).split(room):
            if len(piece) >= room * _LARGE:
                alone.append([piece])
                continue
            if sum(map(len, filling.get(kind, ()))) + len(piece) > room:
                closed.append(filling.pop(kind))
            filling.setdefault(kind, []).append(piece)
    return [*closed, *filling.values(), *alone]
