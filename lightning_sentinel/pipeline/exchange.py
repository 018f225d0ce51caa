"""The one collective of a step: table rows, loss and logged values of all ranks, to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.pipeline.logs import LogRecorder, LogSchema
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.table import no_rows
from lightning_sentinel.wiring import Wiring

__all__ = ["Exchange", "StepOutcome"]


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know of a step.

    Args:
        loss: mean over the samples that count, or ``None`` if none does.
        table: all signals, or ``None`` if nothing is verified.
        weights: ``(lanes, micro_batches)``, the share of its replica's batch that a micro-batch has.
        wiring: who served which lane.
        schema: what the step logs.
        logged: value and weight of each logged name.
        stops: whether a step asks for the end of training.
    """

    loss: float | None
    table: SignalTable | None
    weights: Tensor
    wiring: Wiring
    schema: LogSchema
    logged: dict[str, tuple[float, float]]
    stops: bool = False


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
        rows: Mapping[Direction, Tensor] | None,
        weights: Tensor,
        loss: Tensor,
        recorder: LogRecorder,
        samples: Sequence[int] | None = None,
        stops: bool = False,
    ) -> StepOutcome:
        """Exchange a step.

        Args:
            kind: steps of one kind log the same names: the name of the step function, and the data loader.
            wiring: who served which lane.
            rows: ``(micro_batches, len(COLUMNS))`` of each direction that this rank received; ``None`` if nothing is verified.
            weights: ``(micro_batches,)``, shares that this lane's micro-batches have of their replicas' batches.
            loss: ``(2,)``, sum of weighted losses and sum of weights; zero except on the last stage.
            recorder: what was logged; empty except on the last stage.
            samples: of each replica's batch; ``None`` if all have some. A lane that has none to work on logs nothing.
            stops: whether a step on this rank asks for the end of training; asked of those that serve the last stage.
        """
        schema = self._schemas.get(kind, LogSchema())
        mine = recorder.schema
        values = self._log_vector(recorder, schema)
        fingerprint = torch.tensor([float(mine.fingerprint), float(stops)], device=self._device)
        table = torch.empty(0, device=self._device) if rows is None else self._padded_rows(rows, wiring.slots)
        padded = torch.cat((weights, weights.new_zeros(wiring.slots - len(weights))))
        everyone = self._gather(torch.cat((table.flatten(), padded, loss, fingerprint, values)))
        parts = everyone.split([table.numel(), len(padded), 2, 2, len(values)], dim=1)

        lanes = [lane for lane in wiring.lanes if samples is None or any(samples[part.replica] for part in wiring.work[lane])]
        last = [self._mesh.rank(wiring.worker(self._mesh.stages - 1, lane)) for lane in lanes]
        fingerprints = parts[3][last, 0]
        log_values = parts[4][last]
        if (fingerprints != schema.fingerprint).any():
            schema = self._schemas[kind] = self._agree(kind, mine, fingerprints, last[0])
            log_values = self._gather(self._log_vector(recorder, schema))[last]

        # Of those that serve the last stage: what others say of the loss is not asked for.
        total, weight = parts[2][last].sum(dim=0).tolist()
        return StepOutcome(
            loss=total / weight if weight > 0 else None,
            table=None if rows is None else self._table(parts[0].view(self._mesh.size, *table.shape), wiring),
            weights=self._lane_weights(parts[1], wiring),
            wiring=wiring,
            schema=schema,
            logged=schema.reduce(log_values),
            stops=bool((parts[3][last, 1] > 0).any()),
        )

    def _padded_rows(self, rows: Mapping[Direction, Tensor], slots: int) -> Tensor:
        """``(2, slots, columns)``."""
        padded = no_rows(len(Direction), slots).to(self._device)
        for place, direction in enumerate(Direction):
            if direction in rows:
                padded[place, : len(rows[direction])] = rows[direction]
        return padded

    def _lane_weights(self, everyone: Tensor, wiring: Wiring) -> Tensor:
        """``(lanes, slots)``, as the first stage of each lane says."""
        weights = everyone.new_zeros(self._mesh.replicas, wiring.slots)
        for lane in wiring.lanes:
            weights[lane] = everyone[self._mesh.rank(wiring.worker(0, lane))]
        for lane, parts in enumerate(wiring.work):
            if parts and not wiring.live[lane] and wiring.lanes:
                # Samples that nobody could work on weigh what those of others with the same numbers do.
                weights[lane, : len(parts)] = weights[wiring.lanes[0], : len(parts)]
        return weights

    def _log_vector(self, recorder: LogRecorder, schema: LogSchema) -> Tensor:
        """This rank's values if its names are the agreed ones; else zeros, which weigh nothing. On the device."""
        if recorder.schema.entries == schema.entries:
            return recorder.vector().to(self._device)
        return torch.zeros(schema.width, device=self._device)

    def _gather(self, vector: Tensor) -> Tensor:
        """Everybody's vector, on the host: ``(ranks, ...)``."""
        vector = vector.cpu()
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
        if dist.get_rank() != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, source)
        return LogSchema.decode(bytes(data.tolist()))

    def _table(self, everyone: Tensor, wiring: Wiring) -> SignalTable:
        """Rows by rank ``(ranks, 2, slots, columns)`` put in the order of the boundaries and lanes they were received from."""
        rows = no_rows(len(self._mesh.boundaries), self._mesh.replicas, wiring.slots)
        directions = {direction: place for place, direction in enumerate(Direction)}
        for index, boundary in enumerate(self._mesh.boundaries):
            ranks = [self._mesh.rank(wiring.worker(boundary.receiver, lane)) for lane in wiring.lanes]
            rows[index, wiring.lanes] = everyone[ranks, directions[boundary.direction]]
        return SignalTable.believed(rows)
