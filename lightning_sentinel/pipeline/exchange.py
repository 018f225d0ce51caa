"""The one collective of a step: an all-gather of each rank's table rows, losses, logged values and commitments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError, PlanMismatchError
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments, decode
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.logs import LogRecorder, LogSchema
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import StepOutcome, StepResult, is_skipped, mean_loss
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.table import no_rows
from lightning_sentinel.wiring import Wiring

__all__ = ["Exchange"]

_LONGEST_SCHEMA = 2**24


class Exchange:
    """Gathers a step's results from all ranks in one collective.

    It gathers host tensors, whatever device signals are on. All ranks need the result on the host, so this is a step's one wait for
    the device. And if a rank has died gloo reports it here, before a device waits for that rank and reports nothing.

    The names of logged values are exchanged as JSON when they change; between changes a fingerprint in the collective tells all
    ranks that they still agree.

    Args:
        mesh: all workers, one a rank.
        device: the device of rows, weights and losses.
        transcript: signs what this rank says, and gathers it.
    """

    def __init__(self, mesh: Mesh, device: torch.device, transcript: Transcript) -> None:
        self._mesh = mesh
        self._device = device
        self._transcript = transcript
        self._schemas: dict[str, LogSchema] = {}

    def run(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """Exchange a step.

        Args:
            plan: the step's plan. A lane that has no samples to work on logs nothing.
            result: this rank's results.

        Raises:
            PlanMismatchError: on all ranks, if some have made another plan.
            TableMismatchError: on all ranks, if they saw different things in the step before.
        """
        recorder = result.recorder
        schema = self._schemas.get(plan.log_key, LogSchema())
        values = self._log_vector(recorder, schema)
        counts = (*result.signals, *result.refused)
        known = torch.tensor([float(plan.digest), float(recorder.schema.fingerprint), float(result.stops), *map(float, counts)])
        rows = torch.empty(0, device=self._device) if result.rows is None else self._padded_rows(result.rows, plan.wiring.slots)
        broken = torch.empty(0, device=self._device) if result.broken is None else result.broken.float().view(1)
        contribution = torch.empty(0, device=self._device) if result.contribution is None else result.contribution
        found = torch.cat((rows.flatten(), broken, contribution, result.losses[0], values))
        everyone, parts, forgers = self._said_by_all(plan, torch.cat((found.cpu(), known)), result.commitments)
        sizes = [rows.numel(), len(broken), len(contribution), 3, len(values), 1, 2, len(result.signals), len(result.refused)]
        all_rows, all_broken, contributions, all_losses, all_values, digests, steps, signals, refused = everyone.split(sizes, dim=1)
        self._require_the_same_plan(digests[:, 0], plan)

        last = [self._mesh.rank(plan.wiring.worker(self._mesh.stages - 1, lane)) for lane in plan.working_lanes]
        fingerprints = steps[last, 0]
        log_values = all_values[last]
        if (fingerprints != schema.fingerprint).any():
            schema = self._schemas[plan.log_key] = self._agree(plan.log_key, recorder.schema, fingerprints, last[0])
            log_values = world().all_gather(self._log_vector(recorder, schema).cpu())[last]

        # Only of workers of the last stage: losses that other ranks report do not count.
        losses = all_losses[last]
        return StepOutcome(
            loss=mean_loss(losses, believed=result.broken is None),
            table=None if result.rows is None else self._table(all_rows.view(self._mesh.size, *rows.shape), plan.wiring),
            broken=None if result.broken is None else self._broken(all_broken, plan.wiring),
            schema=schema,
            logged=schema.reduce(log_values),
            stops=bool((steps[last, 1] > 0).any()),
            skipped=is_skipped(losses),
            signals=tuple(int(count) for count in signals.nan_to_num(0, 0, 0).amax(dim=0).tolist()),
            refused=self._by_stage(refused.nan_to_num(0, 0, 0)) if result.refused else None,
            commitments=self._commitments(plan, parts),
            forgers=forgers,
            contributions=None if result.contribution is None else self._by_stage(contributions),
        )

    def _said_by_all(self, plan: StepPlan, numbers: Tensor, commitments: bytes) -> tuple[Tensor, list[bytes], frozenset[Worker]]:
        """What all ranks say: numbers, ``(ranks, ...)`` float32, their parts of the commitments, and who forged the row before."""
        moment = plan.moment(self._transcript.credentials.run)
        size = numbers.nbytes
        table = self._transcript.exchange(moment, numbers.numpy().tobytes() + commitments)
        said = b"".join(row[:size] for row in table.rows)
        everyone = torch.frombuffer(bytearray(said), dtype=torch.float32).view(self._mesh.size, -1)
        return everyone, [row[size:] for row in table.rows], table.forgers

    def _commitments(self, plan: StepPlan, parts: list[bytes]) -> StepCommitments | None:
        if not plan.audited:
            return None
        return decode(parts, self._mesh, plan.wiring, plan.moment(self._transcript.credentials.run))

    def _require_the_same_plan(self, digests: Tensor, plan: StepPlan) -> None:
        # A non-finite digest says nothing about a plan, and must not end the run.
        digests = digests.where(digests.isfinite(), float(plan.digest))
        if (digests == plan.digest).all():
            return
        usual = digests == digests.mode().values
        # Where no plan is that of most ranks nobody can tell which ranks are wrong: all are named.
        named = ~usual if 2 * int(usual.sum()) > len(usual) else torch.ones_like(usual)
        others = ", ".join(f"rank {rank} ({self._mesh.worker(rank)})" for rank in named.nonzero().flatten().tolist())
        who = f"another plan than most have {others}" if not named.all() else f"no plan is that of most of {others}"
        raise PlanMismatchError(
            f"Ranks disagree on who does what in {plan.log_key} {plan.number}: {who}. What the plan"
            " follows from, such as bans, batch sizes and seeds, must be the same everywhere. Look for a callback that acts on one"
            " rank only."
        )

    def _padded_rows(self, rows: Mapping[Boundary, Tensor], slots: int) -> Tensor:
        """``(2, slots, columns)``, this worker's rows by direction."""
        padded = no_rows(len(Direction), slots).to(self._device)
        for boundary, (own,) in rows.items():
            padded[list(Direction).index(boundary.direction), : len(own)] = own
        return padded

    def _broken(self, everyone: Tensor, wiring: Wiring) -> Tensor:
        """``(stages, lanes, slots)`` bool, equal in all slots: a worker's summed gradients are usable as a whole, or not at all."""
        lanes = range(self._mesh.replicas)
        ranks = [[self._mesh.rank(wiring.worker(stage, lane)) for lane in lanes] for stage in range(self._mesh.stages)]
        said = (everyone[:, 0] != 0)[torch.tensor(ranks)] & torch.tensor(wiring.live)
        return said[..., None].expand(-1, -1, wiring.slots)

    def _by_stage(self, said: Tensor) -> Tensor:
        """The ranks' reports by worker, ``(stages, replicas, ...)``."""
        mesh = self._mesh
        ranks = [[mesh.rank(Worker(stage, replica)) for replica in range(mesh.replicas)] for stage in range(mesh.stages)]
        return said[torch.tensor(ranks)]

    def _log_vector(self, recorder: LogRecorder, schema: LogSchema) -> Tensor:
        """This rank's logged values if its names are the agreed ones; else zeros, which have no weight. On the device."""
        if recorder.schema.entries == schema.entries:
            return recorder.vector().to(self._device)
        return torch.zeros(schema.width, device=self._device)

    def _agree(self, kind: str, mine: LogSchema, fingerprints: Tensor, source: int) -> LogSchema:
        """Adopt the names of one rank. All ranks call this, because all saw the same fingerprints."""
        if (fingerprints != fingerprints[0]).any():
            raise PipelineModelError(
                f"The replicas log different names in {kind}; this rank logs {sorted(mine.entries) or 'nothing'}. Log the same"
                " names in every step: a name that one replica leaves out cannot be reduced over all."
            )
        data = world().broadcast_bytes(mine.encode(), source, _LONGEST_SCHEMA, "a list of logged names")
        try:
            return LogSchema.decode(data)
        except MalformedMessageError as error:
            raise MalformedMessageError(f"Rank {source} sent a malformed message. {error}", rank=source) from error

    def _table(self, everyone: Tensor, wiring: Wiring) -> SignalTable:
        """The signal table: rows by rank, ``(ranks, 2, slots, columns)``, reordered by the boundary and lane of their signals."""
        rows = no_rows(len(self._mesh.boundaries), self._mesh.replicas, wiring.slots)
        directions = {direction: place for place, direction in enumerate(Direction)}
        for index, boundary in enumerate(self._mesh.boundaries):
            ranks = [self._mesh.rank(wiring.worker(boundary.receiver, lane)) for lane in wiring.lanes]
            rows[index, wiring.lanes] = everyone[ranks, directions[boundary.direction]]
        return SignalTable.believed(rows)
