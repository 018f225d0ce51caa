"""Audits on a virtual mesh, where a peer's recomputation is simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.virtual_boundaries import VirtualStep
from lightning_sentinel.pipeline.virtual_workers import VirtualWorkers
from lightning_sentinel.verification.audit import Outcome, tolerance
from lightning_sentinel.verification.jury import Case, ContributionCase
from lightning_sentinel.verification.sketches import sketch_error
from lightning_sentinel.verification.tolerance import MEASURED

__all__ = ["VirtualAudits"]


class VirtualAudits:
    """The votes of auditors on the signals of one step.

    This process computed each worker's honest signal before an adversary replaced it, so an audit looks up the measured error. The
    adversary may replace the vote of a worker that it controls.

    Args:
        workers: the workers of the mesh.
        running: the step.
        computed_in: the dtype in which the device multiplies float32.
    """

    def __init__(self, workers: VirtualWorkers, running: VirtualStep, computed_in: Callable[[], torch.dtype]) -> None:
        self._workers = workers
        self._running = running
        self._computed_in = computed_in
        self._errors: dict[int, dict[tuple[int, int], list[float]]] | None = None
        """Measured errors of the step's signals, by boundary and place; ``None`` before the step's first audit."""

    def ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        """The votes of workers on cases."""
        guard = self._workers.guard
        assert guard is not None, "it is what asks"
        if not asked:
            return []
        errors = self._known_errors()
        tolerances = guard.tolerances
        adversary = self._workers.adversary
        votes = []
        for case, juror in asked:
            index = self._workers.mesh.boundaries.index(case.boundary)
            place = (case.lane, case.slot)
            measured = self._running.measured.get(index, {})
            found = errors.get(index, {}).get(place, [0.0] * MEASURED)
            dtype = measured[place][0] if place in measured else torch.float32
            lied = found[0] > tolerances.allowed(index, case.audited, dtype, self._computed_in())
            vote = Outcome.LIED if lied else Outcome.MATCHES
            votes.append(vote if adversary is None else Outcome(adversary.vote(juror, case.audited, vote)))
            if votes[-1] == Outcome.MATCHES:
                tolerances.heard(index, case.audited, found)
        return votes

    def ask_of_contributions(self, asked: Sequence[tuple[ContributionCase, Worker]]) -> list[Outcome]:
        """The votes of workers on contributions to weight gradients; a contribution that is not looked at is honest."""
        adversary = self._workers.adversary
        votes = []
        for case, juror in asked:
            known = self._running.contributed.get(case.audited)
            lied = known is not None and bool(sketch_error(known.added, known.honest) > tolerance(known.dtype, self._computed_in()))
            vote = Outcome.LIED if lied else Outcome.MATCHES
            votes.append(vote if adversary is None else Outcome(adversary.vote(juror, case.audited, vote)))
        return votes

    def _known_errors(self) -> dict[int, dict[tuple[int, int], list[float]]]:
        """The host waits for the device only at a step's first audit."""
        if self._errors is None:
            measured = [found for places in self._running.measured.values() for _, found in places.values()]
            values = iter(torch.stack(measured).tolist() if measured else ())
            self._errors = {
                boundary: {place: next(values) for place in places} for boundary, places in self._running.measured.items()
            }
        return self._errors
