"""Draws between processes: each rank shows a seal in its row of the step, and what it has drawn once all rows are there.

Rows alone would not do: a liar whose schedule ends late could read the rows of others before it sends its last signals.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.draws import seal
from lightning_sentinel.verification.draws import NUMBER_BYTES, Draws, own_number

__all__ = ["SealedDraws"]


class SealedDraws:
    """What this rank draws in each step.

    Args:
        mesh: all workers.
        worker: the worker of this process.
        seed: of a repeatable run, in which everybody who knows it knows all draws; ``None`` draws from the operating system.
        transcript: binds this rank to what it heard of others.
    """

    def __init__(self, mesh: Mesh, worker: Worker, seed: int | None, transcript: Transcript) -> None:
        self._mesh = mesh
        self._worker = worker
        self._seed = seed
        self._transcript = transcript
        self._number = bytes(NUMBER_BYTES)

    def seal(self, plan: StepPlan) -> bytes:
        """Draw for a step, and return the seal that goes into this rank's row; nothing in a step that is not audited."""
        if not plan.audited:
            return b""
        if self._seed is None:
            self._number = os.urandom(NUMBER_BYTES)
        else:
            self._number = own_number(self._seed, self._worker, plan.number).to_bytes(NUMBER_BYTES, "big")
        return self._sealed(self._number, self._worker, plan).encode()

    def open(self, plan: StepPlan, sealed: Mapping[Worker, Digest]) -> tuple[Draws, frozenset[Worker]]:
        """Say what this rank has drawn, and hear what others have; a collective.

        Args:
            plan: the step's plan.
            sealed: the seals in the rows of the step; of a worker without one no number counts.

        Returns:
            what workers have drawn, and the workers that show no seal or do not open theirs; the same on all ranks.
        """
        everyone = world().all_gather(torch.frombuffer(bytearray(self._number), dtype=torch.uint8))
        self._transcript.hear(everyone)
        shown = dict(zip(self._mesh.workers, (one.numpy().tobytes() for one in everyone)))
        opened = {worker: one for worker, one in shown.items() if sealed.get(worker) == self._sealed(one, worker, plan)}
        liars = frozenset(shown.keys() - opened.keys() - plan.banned)
        return Draws({worker: int.from_bytes(one, "big") for worker, one in opened.items()}), liars

    def _sealed(self, number: bytes, worker: Worker, plan: StepPlan) -> Digest:
        credentials = self._transcript.credentials
        return seal(number, plan.moment(credentials.run), worker, credentials.algorithm)
