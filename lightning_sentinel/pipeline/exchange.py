"""The one collective of a step: table rows, loss and logged values of all ranks, to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError
from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.logs import LogRecorder, LogSchema
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.table import no_rows
from lightning_sentinel.wiring import Wiring

__all__ = ["Aside", "Exchange", "StepOutcome", "is_skipped", "mean_loss", "part_weights"]

_LONGEST_SCHEMA = 2**24


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know of a step.

    Args:
        loss: mean over the samples that count, or ``None`` if none does.
        table: all signals, or ``None`` if nothing is verified.
        weights: ``(lanes, micro_batches)``, the share of its replica's batch that a micro-batch has.
        broken: ``(stages, lanes, micro_batches)`` bool, whose weight gradients are of no use at a stage, because they are not
            finite; ``None`` where nobody looks.
        wiring: who served which lane.
        schema: what the step logs.
        logged: value and weight of each logged name.
        stops: whether a step asks for the end of training.
        skipped: whether ``training_step`` returned ``None`` for all that count.
        signals: how many of each kind of signal any process has had, of those that a run acts upon; empty if nobody asks.
        refused: ``(stages, replicas, replicas)``, how often each worker has seen each of its stage add what is not finite to what
            that learns; ``None`` if nobody looks.
    """

    loss: float | None
    table: SignalTable | None
    weights: Tensor
    broken: Tensor | None
    wiring: Wiring
    schema: LogSchema
    logged: dict[str, tuple[float, float]]
    stops: bool = False
    skipped: bool = False
    signals: tuple[int, ...] = ()
    refused: Tensor | None = None


class Aside(NamedTuple):
    """What a rank knows besides, on the host.

    Args:
        stops: whether a step on this rank asks for the end of training; asked of those that serve the last stage.
        signals: how many of each kind this process has had; as many kinds on all ranks.
        refused: how often each worker of its stage has added what is not finite to what that learns; empty if nobody looks, on all
            ranks.
    """

    stops: bool = False
    signals: Sequence[int] = ()
    refused: Sequence[int] = ()


def part_weights(wiring: Wiring, sizes: BatchSizes) -> Tensor:
    """``(lanes, micro_batches)``, the share of its replica's batch that each micro-batch has: all ranks know it by themselves.

    Example:
        >>> from lightning_sentinel.mesh import Mesh
        >>> part_weights(Wiring.of(Mesh(2, 2), micro_batches=2), BatchSizes(2, (4, 3)))
        tensor([[0.5000, 0.5000],
                [0.6667, 0.3333]])
    """
    shares = [[sizes.work(replica, part)[1] for part in range(sizes.micro_batches)] for replica in range(len(sizes.samples))]
    return wiring.arrange(torch.tensor(shares))


def mean_loss(losses: Tensor, believed: bool) -> float | None:
    """The loss of a step, or ``None`` if nothing counts.

    Args:
        losses: ``(lanes, 3)``, the sum of each lane's weighted losses, of their weights, and of those of what has no loss.
        believed: whatever they are. Else one that is not finite is passed over, as are its gradients, unless all are like that.

    Example:
        >>> losses = torch.tensor([[3.0, 1.0, 0.0], [torch.nan, 1.0, 0.0]])
        >>> mean_loss(losses, believed=False), mean_loss(losses, believed=True)
        (3.0, nan)
    """
    finite = losses.isfinite().all(dim=1)
    if not believed and finite.any():
        losses = losses[finite]
    total, weight, _ = losses.sum(dim=0).tolist()
    return total / weight if weight > 0 else None


def is_skipped(losses: Tensor) -> bool:
    """Whether ``training_step`` returned ``None`` for all that counts, of what :func:`mean_loss` takes.

    Example:
        >>> is_skipped(torch.tensor([[0.0, 0.0, 1.0]])), is_skipped(torch.tensor([[0.3, 0.5, 0.5]]))
        (True, False)
    """
    return bool((losses[:, 2] > 0).any() and not (losses[:, 1] > 0).any())


class Exchange:
    """Gathers a step's results from all ranks in one collective.

    It is one of host tensors, whatever device signals are on: everybody needs the result there, so that a device is waited for once
    a step; and a rank that has died is missed here by gloo, which says so, before a device waits for it, which would not.

    The names of logged values are exchanged as JSON when they change; between changes a fingerprint in the collective tells all
    ranks that they still agree.

    Args:
        mesh: all workers, one a rank.
        device: where rows, weights and losses are.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh = mesh
        self._device = device
        self._schemas: dict[str, LogSchema] = {}

    def run(
        self,
        kind: str,
        wiring: Wiring,
        sizes: BatchSizes,
        rows: Mapping[Direction, Tensor] | None,
        loss: Tensor,
        recorder: LogRecorder,
        broken: Tensor | None = None,
        aside: Aside = Aside(),  # noqa: B008 - a tuple
    ) -> StepOutcome:
        """Exchange a step.

        Args:
            kind: steps of one kind log the same names: the name of the step function, and the data loader.
            wiring: who served which lane.
            sizes: of all replicas' batches. A lane that has no samples to work on logs nothing.
            rows: ``(micro_batches, len(COLUMNS))`` of each direction that this rank received; ``None`` if nothing is verified.
            loss: ``(3,)``, sum of weighted losses, sum of their weights, and of the weights of what ``training_step`` returned
                ``None`` for; zero except on the last stage.
            recorder: what was logged; empty except on the last stage.
            broken: 0-dim bool, whether this rank's weight gradients are of no use; ``None`` if that is not asked, on all ranks.
            aside: what this rank knows besides.
        """
        schema = self._schemas.get(kind, LogSchema())
        mine = recorder.schema
        values = self._log_vector(recorder, schema)
        known = torch.tensor([float(mine.fingerprint), float(aside.stops), *map(float, (*aside.signals, *aside.refused))])
        table = torch.empty(0, device=self._device) if rows is None else self._padded_rows(rows, wiring.slots)
        of_no_use = torch.empty(0, device=self._device) if broken is None else broken.float().view(1)
        everyone = self._gather(torch.cat((table.flatten(), of_no_use, loss, values)), known)
        parts = everyone.split([table.numel(), len(of_no_use), 3, len(values), 2, len(aside.signals), len(aside.refused)], dim=1)

        lanes = [lane for lane in wiring.lanes if any(sizes.samples[part.replica] for part in wiring.work[lane])]
        last = [self._mesh.rank(wiring.worker(self._mesh.stages - 1, lane)) for lane in lanes]
        fingerprints = parts[4][last, 0]
        log_values = parts[3][last]
        if (fingerprints != schema.fingerprint).any():
            schema = self._schemas[kind] = self._agree(kind, mine, fingerprints, last[0])
            log_values = self._gather(self._log_vector(recorder, schema))[last]

        # Of those that serve the last stage: what others say of the loss is not asked for.
        losses = parts[2][last]
        return StepOutcome(
            loss=mean_loss(losses, believed=broken is None),
            table=None if rows is None else self._table(parts[0].view(self._mesh.size, *table.shape), wiring),
            weights=part_weights(wiring, sizes),
            broken=None if broken is None else self._broken(parts[1], wiring),
            wiring=wiring,
            schema=schema,
            logged=schema.reduce(log_values),
            stops=bool((parts[4][last, 1] > 0).any()),
            skipped=is_skipped(losses),
            signals=tuple(int(count) for count in parts[5].nan_to_num(0, 0, 0).amax(dim=0).tolist()),
            refused=self._by_stage(parts[6].nan_to_num(0, 0, 0)) if aside.refused else None,
        )

    def _padded_rows(self, rows: Mapping[Direction, Tensor], slots: int) -> Tensor:
        """``(2, slots, columns)``."""
        padded = no_rows(len(Direction), slots).to(self._device)
        for place, direction in enumerate(Direction):
            if direction in rows:
                padded[place, : len(rows[direction])] = rows[direction]
        return padded

    def _broken(self, everyone: Tensor, wiring: Wiring) -> Tensor:
        """``(stages, lanes, slots)`` bool: what is added up is of use as a whole, or not at all."""
        lanes = range(self._mesh.replicas)
        ranks = [[self._mesh.rank(wiring.worker(stage, lane)) for lane in lanes] for stage in range(self._mesh.stages)]
        said = (everyone[:, 0] != 0)[torch.tensor(ranks)] & torch.tensor(wiring.live)
        return said[..., None].expand(-1, -1, wiring.slots)

    def _by_stage(self, said: Tensor) -> Tensor:
        """What ranks say, ``(stages, replicas, ...)``."""
        mesh = self._mesh
        ranks = [[mesh.rank(Worker(stage, replica)) for replica in range(mesh.replicas)] for stage in range(mesh.stages)]
        return said[torch.tensor(ranks)]

    def _log_vector(self, recorder: LogRecorder, schema: LogSchema) -> Tensor:
        """This rank's values if its names are the agreed ones; else zeros, which weigh nothing. On the device."""
        if recorder.schema.entries == schema.entries:
            return recorder.vector().to(self._device)
        return torch.zeros(schema.width, device=self._device)

    def _gather(self, found: Tensor, known: Tensor | None = None) -> Tensor:
        """Everybody's vector, on the host: ``(ranks, ...)``; what was found on the device, and what is known on the host."""
        vector = found.cpu() if known is None else torch.cat((found.cpu(), known))
        gathered = torch.empty(self._mesh.size, len(vector))
        if len(vector):
            dist.all_gather(list(gathered.unbind()), vector)
        return gathered

    def _agree(self, kind: str, mine: LogSchema, fingerprints: Tensor, source: int) -> LogSchema:
        """Take the names over from one rank. All ranks are here, because all saw the same fingerprints."""
        if (fingerprints != fingerprints[0]).any():
            raise PipelineModelError(
                f"The replicas log different names in {kind}; this rank logs {sorted(mine.entries) or 'nothing'}. Log the same"
                " names in every step: a name that one replica leaves out cannot be reduced over all."
            )
        data = torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        dist.broadcast(size, source)
        if not 0 < (length := int(size)) <= _LONGEST_SCHEMA:
            raise MalformedMessageError(
                f"Rank {source} announces {length} bytes of logged names, which there cannot be.", rank=source
            )
        if dist.get_rank() != source:
            data = torch.empty(length, dtype=torch.uint8)
        dist.broadcast(data, source)
        try:
            return LogSchema.decode(data.numpy().tobytes())
        except MalformedMessageError as error:
            raise MalformedMessageError(f"Rank {source} sent a malformed message. {error}", rank=source) from error

    def _table(self, everyone: Tensor, wiring: Wiring) -> SignalTable:
        """Rows by rank ``(ranks, 2, slots, columns)`` put in the order of the boundaries and lanes they were received from."""
        rows = no_rows(len(self._mesh.boundaries), self._mesh.replicas, wiring.slots)
        directions = {direction: place for place, direction in enumerate(Direction)}
        for index, boundary in enumerate(self._mesh.boundaries):
            ranks = [self._mesh.rank(wiring.worker(boundary.receiver, lane)) for lane in wiring.lanes]
            rows[index, wiring.lanes] = everyone[ranks, directions[boundary.direction]]
        return SignalTable.believed(rows)
