"""The verifiers that one process holds, and the part of a step that they play.

Both engines use it: a process of the real mesh guards the boundaries that it receives from, the virtual engine guards all. At
receipt a signal's *value* may change, never the control flow; everything that changes what ranks do next is settled once a step,
by all ranks from the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Boundary, Mesh, Worker
from lightning_sentinel.verification import COLUMNS, BoundaryVerifier, Ledger, SignalTable, StepVerdict, judge
from lightning_sentinel.verification.momentum import Contribution

__all__ = ["Guard"]


class Guard:
    """Verifies what this process receives.

    Args:
        mesh: all workers.
        boundaries: the boundaries that this process receives from.
        verification: how signals are verified.
        response: what follows from a flag.
        ledger: flags and bans; the same on all ranks.
        device: where signals are.
    """

    def __init__(
        self,
        mesh: Mesh,
        boundaries: Iterable[Boundary],
        verification: Verification,
        response: Response,
        ledger: Ledger,
        device: torch.device,
    ) -> None:
        self._mesh = mesh
        self._response = response
        self._device = device
        self.ledger = ledger
        self.verifiers = {boundary: BoundaryVerifier(boundary, verification, device) for boundary in boundaries}
        self._rows: dict[tuple[Boundary, int, int], Tensor] = {}

    @property
    def excludes(self) -> bool:
        """Whether flagged micro-batches are kept out of the weights, rather than only reported."""
        return self._response.on_flag == "exclude"

    @property
    def live(self) -> Tensor:
        """``(replicas,)`` bool: pipelines without a banned worker."""
        banned = {worker.replica for worker in self.ledger.banned}
        return torch.tensor([replica not in banned for replica in range(self._mesh.replicas)])

    def initial_taint(self, replica: int) -> Tensor:
        """The taint with which a replica's micro-batches start: 0-dim bool, false while its pipeline is live."""
        return torch.tensor(not bool(self.live[replica]), device=self._device)

    def receive(self, boundary: Boundary, replica: int, micro_batch: int, signal: Tensor, tainted: Tensor) -> tuple[Tensor, Tensor]:
        """Verify a signal.

        Args:
            signal: what the neighbour sent.
            tainted: 0-dim bool, what the neighbour's own verifier had found before.

        Returns:
            the signal to go on with, and the taint to pass on.
        """
        verifier = self.verifiers[boundary]
        row, flagged = verifier.inspect(signal, tainted, replica)
        self._rows[boundary, replica, micro_batch] = row
        tainted = tainted | flagged
        if self.excludes:
            signal = torch.where(tainted, verifier.substitute(signal), signal)
        return signal, tainted

    def rows(self, boundary: Boundary, replica: int, micro_batches: int) -> Tensor:
        """This step's rows of one boundary and replica, ``(micro_batches, len(COLUMNS))``; zero where nothing is guarded."""
        nothing = torch.zeros(len(COLUMNS), device=self._device)
        return torch.stack([self._rows.pop((boundary, replica, m), nothing) for m in range(micro_batches)])

    def settle(self, table: SignalTable, step: int) -> tuple[StepVerdict, list[Worker]]:
        """Verdicts of the step, entered into the ledger.

        Returns:
            the verdict, and the workers that it bans.

        Raises:
            MeshExhaustedError: on all ranks, if no complete pipeline is left.
        """
        self._require_a_pipeline(step)
        verdict = judge(table, self._mesh, self.live, step, exclude=self.excludes)
        banned = self.ledger.record(step, verdict.flagged, verdict.suspects, verdict.verified)
        self._require_a_pipeline(step)
        return verdict, banned

    def _require_a_pipeline(self, step: int) -> None:
        if not self.live.any():
            raise MeshExhaustedError(
                f"Every pipeline has a banned worker at step {step}: {', '.join(map(str, sorted(self.ledger.banned)))}. The run"
                f" cannot go on with {self._mesh.replicas} replica(s). Use more replicas, or strategy='sentinel_monitor', which"
                " reports and bans nobody."
            )

    def learn(self, table: SignalTable, verdict: StepVerdict, sum_over_replicas: Callable[[Tensor], Tensor]) -> None:
        """Let the verifiers take in the honest signals of the step.

        Args:
            sum_over_replicas: adds a vector over the replicas of this stage; called once, with vectors of the same length on
                all of them.
        """
        contributions: dict[Boundary, Contribution] = {}
        order = {boundary: index for index, boundary in enumerate(self._mesh.boundaries)}
        for boundary, verifier in self.verifiers.items():
            index = order[boundary]
            standing = (table.flagged & ~verdict.cleared)[index].any(dim=1)
            cleared = (verdict.cleared[index].any(dim=1) & ~standing).nonzero().flatten().tolist()
            mine = verifier.contribution(cleared)
            if verdict.honest[index].any():
                # As long as the longest honest signal of any replica; what a tainted one had beyond it is not to be remembered.
                positions = table.column("positions")[index][verdict.honest[index]].max()
                contributions[boundary] = mine.resized(int(positions))
        summed: dict[Boundary, Contribution] = {}
        if contributions:
            vectors = [contribution.flat() for contribution in contributions.values()]
            parts = sum_over_replicas(torch.cat(vectors)).split([len(vector) for vector in vectors])
            for (boundary, mine), part in zip(contributions.items(), parts):
                summed[boundary] = Contribution.from_flat(part, len(mine.count))
        for boundary, verifier in self.verifiers.items():
            index = order[boundary]
            verifier.learn(summed.get(boundary), table.features[index][verdict.honest[index]])

    def state_dict(self) -> dict[str, Tensor]:
        """State of the verifiers that this process holds, keyed by boundary."""
        return {
            f"{boundary.name}/{name}": value
            for boundary, verifier in self.verifiers.items()
            for name, value in verifier.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the verifiers that this process holds; boundaries that the state does not know start afresh."""
        for boundary, verifier in self.verifiers.items():
            prefix = f"{boundary.name}/"
            mine = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if mine:
                verifier.load_state_dict(mine)
