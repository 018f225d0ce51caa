"""The one collective of a step: table rows, loss and logged values of all ranks, to all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.pipeline.logs import LogRecorder, LogSchema
from lightning_sentinel.verification import COLUMNS, SignalTable

__all__ = ["Exchange", "StepOutcome"]


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know of a step.

    Args:
        loss: mean over the samples that count, or ``None`` if none does.
        table: all signals, or ``None`` if nothing is verified.
        weights: ``(replicas, micro_batches)``, the share of its replica's batch that a micro-batch has.
        schema: what the step logs.
        logged: value and number of samples of each logged name.
    """

    loss: float | None
    table: SignalTable | None
    weights: Tensor
    schema: LogSchema
    logged: dict[str, tuple[float, float]]


class Exchange:
    """Gathers a step's results from all ranks in one collective.

    The names of logged values are exchanged as JSON when they change; between changes a fingerprint in the collective tells all
    ranks that they still agree.

    Args:
        mesh: all workers, one a rank.
        device: where the collective's tensors are.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh = mesh
        self._device = device
        self._schemas: dict[str, LogSchema] = {}

    def run(self, kind: str, rows: Tensor, weights: Tensor, loss: Tensor, recorder: LogRecorder) -> StepOutcome:
        """Exchange a step.

        Args:
            kind: steps of one kind log the same names: the name of the step function, and the data loader.
            rows: ``(2, micro_batches, len(COLUMNS))``, what this rank received: activations, then gradients; or empty.
            weights: ``(micro_batches,)``, shares of this replica's batch.
            loss: ``(2,)``, sum of weighted losses and sum of weights; zero except on the last stage.
            recorder: what was logged; empty except on the last stage.
        """
        schema = self._schemas.get(kind, LogSchema())
        mine = recorder.schema
        values = self._log_vector(recorder, schema)
        fingerprint = torch.tensor([float(mine.fingerprint)], device=self._device)
        everyone = self._gather(torch.cat((rows.flatten(), weights, loss, fingerprint, values)))
        parts = everyone.split([rows.numel(), len(weights), 2, 1, len(values)], dim=1)

        last = list(self._mesh.stage_ranks(self._mesh.stages - 1))
        fingerprints = parts[3][last, 0]
        log_values = parts[4][last]
        if (fingerprints != schema.fingerprint).any():
            schema = self._schemas[kind] = self._agree(kind, mine, fingerprints)
            log_values = self._gather(self._log_vector(recorder, schema))[last]

        total, weight = parts[2].sum(dim=0).tolist()
        return StepOutcome(
            loss=total / weight if weight > 0 else None,
            table=self._table(parts[0].view(self._mesh.size, *rows.shape)) if rows.numel() else None,
            weights=parts[1][: self._mesh.replicas],
            schema=schema,
            logged=schema.reduce(log_values),
        )

    def _log_vector(self, recorder: LogRecorder, schema: LogSchema) -> Tensor:
        """This rank's values if its names are the agreed ones; else zeros, which weigh nothing."""
        if recorder.schema.entries == schema.entries:
            return recorder.vector().to(self._device)
        return torch.zeros(2 * len(schema.names), device=self._device)

    def _gather(self, vector: Tensor) -> Tensor:
        gathered = torch.empty(self._mesh.size, len(vector), device=self._device)
        if len(vector):
            dist.all_gather(list(gathered.unbind()), vector)
        return gathered.cpu()

    def _agree(self, kind: str, mine: LogSchema, fingerprints: Tensor) -> LogSchema:
        """Take the names over from the first replica's last stage. All ranks are here, because all saw the same fingerprints."""
        if (fingerprints != fingerprints[0]).any():
            raise PipelineModelError(
                f"The replicas log different names in {kind}; this rank logs {sorted(mine.entries) or 'nothing'}. Log the same"
                " names in every step: a name that one replica leaves out cannot be reduced over all."
            )
        source = self._mesh.stage_ranks(self._mesh.stages - 1)[0]
        data = torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8).to(self._device)
        size = torch.tensor([len(data)], device=self._device)
        dist.broadcast(size, source)
        if dist.get_rank() != source:
            data = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        dist.broadcast(data, source)
        return LogSchema.decode(bytes(data.cpu().tolist()))

    def _table(self, everyone: Tensor) -> SignalTable:
        """Rows by rank ``(ranks, 2, micro_batches, columns)`` put in the order of the boundaries they were received from."""
        slots = {direction: slot for slot, direction in enumerate(Direction)}
        rows = [
            everyone[list(self._mesh.stage_ranks(boundary.receiver)), slots[boundary.direction]]
            for boundary in self._mesh.boundaries
        ]
        return SignalTable(torch.stack(rows) if rows else everyone.new_empty(0, *everyone.shape[1:3], len(COLUMNS)))
