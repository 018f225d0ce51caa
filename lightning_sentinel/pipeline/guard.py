"""The verifiers that one process holds, and the part of a step that they play.

Both engines use it: a process of the real mesh guards the boundaries that it receives from, the virtual engine guards all. At
receipt a signal's *value* may change, never the control flow; everything that changes what ranks do next is settled once a step,
by all ranks from the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Boundary, Mesh, Worker
from lightning_sentinel.verification import BoundaryVerifier, Ledger, SignalTable, StepVerdict, judge
from lightning_sentinel.verification.momentum import Contribution

__all__ = ["Guard"]


class Guard:
    """Verifies what this process receives.

    Args:
        mesh: all workers.
        boundaries: the boundaries that this process receives from.
        replicas: the replicas that it receives from, in the order of signals.
        verification: how signals are verified.
        response: what follows from a flag.
        ledger: flags and bans; the same on all ranks.
        device: where signals are.
    """

    def __init__(
        self,
        mesh: Mesh,
        boundaries: Iterable[Boundary],
        replicas: Sequence[int],
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
        self._replicas = list(replicas)
        self._rows: dict[Boundary, list[Tensor]] = {boundary: [] for boundary in self.verifiers}

    @property
    def excludes(self) -> bool:
        """Whether flagged micro-batches are kept out of the weights, rather than only reported."""
        return self._response.on_flag == "exclude"

    @property
    def live(self) -> Tensor:
        """``(replicas,)`` bool: pipelines without a banned worker."""
        banned = {worker.replica for worker in self.ledger.banned}
        return torch.tensor([replica not in banned for replica in range(self._mesh.replicas)])

    def initial_taint(self) -> Tensor:
        """The taint with which micro-batches start, ``(replicas,)`` bool: false while a pipeline is live."""
        return ~self.live[self._replicas].to(self._device)

    def receive(self, boundary: Boundary, signals: Tensor, tainted: Tensor) -> tuple[Tensor, Tensor]:
        """Verify what the neighbours sent; to be called in the order of micro-batches.

        Args:
            signals: ``(replicas * B, ...)``, of one micro-batch.
            tainted: ``(replicas,)`` bool, what the neighbours' own verifiers had found before.

        Returns:
            the signals to go on with, and the taint to pass on.
        """
        verifier = self.verifiers[boundary]
        rows, flagged = verifier.inspect(signals, tainted)
        self._rows[boundary].append(rows)
        tainted = tainted | flagged
        if self.excludes:
            samples = tainted.repeat_interleave(len(signals) // len(tainted))
            samples = samples.view(-1, *(1 for _ in signals.shape[1:]))
            signals = torch.where(samples, verifier.substitute(signals), signals)
        return signals, tainted

    def take_rows(self, boundary: Boundary) -> Tensor:
        """This step's rows of one boundary, ``(replicas, micro_batches, len(COLUMNS))``, and forget them."""
        rows, self._rows[boundary] = self._rows[boundary], []
        return torch.stack(rows, dim=1)

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
            cleared = verdict.cleared[index].any(dim=1) & ~standing
            mine = verifier.contribution(cleared[self._replicas])
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
