"""Checks of what workers add to the weight gradients of their stage, the same on all ranks: who is audited, and what follows.

Each worker's row of the step's collective has a sketch of its contribution. Others of its stage recompute the whole of it, before
it reaches a weight, where it is out of line or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.verification import Ledger, StepVerdict
from lightning_sentinel.verification.audit import honest_by_stage
from lightning_sentinel.verification.contribution_scores import ContributionScores
from lightning_sentinel.verification.contributions import with_contributions
from lightning_sentinel.verification.draws import Draws, chance_of_each
from lightning_sentinel.verification.jury import AskOfContributions, ContributionCase, Jury
from lightning_sentinel.verification.sketches import GradientSketch
from lightning_sentinel.verification.table import mask_of

__all__ = ["ContributionChecks", "Contributions", "weights_of_workers"]


class Contributions(NamedTuple):
    """What a step's workers contributed to the weight gradients of their stages.

    Args:
        sketches: ``(stages, replicas, SKETCHED)``; ``None`` on a virtual mesh where nobody corrupts them.
        ask: has workers recompute contributions.
    """

    sketches: Tensor | None
    ask: AskOfContributions


def weights_of_workers(plan: StepPlan) -> Tensor:
    """``(stages, replicas)``, of how much data each worker's contribution is; 0 for one that serves no lane, or an empty one."""
    weights = torch.zeros(plan.mesh.stages, plan.mesh.replicas)
    for lane in plan.working_lanes:
        for stage in range(plan.mesh.stages):
            weights[stage, plan.wiring.worker(stage, lane).replica] = plan.weights[lane].sum()
    return weights


class ContributionChecks:
    """Checks contributions to weight gradients, and remembers what honest ones look like.

    Args:
        mesh: the workers.
        verification: how signals are verified, with the secret seed.
        response: how often contributions are recomputed.
    """

    def __init__(self, mesh: Mesh, verification: Verification, response: Response) -> None:
        assert verification.seed is not None, "drawn before"
        self._mesh = mesh
        self._rate = response.gradient_audit_rate_of(mesh)
        self._repeats = response.on_flag == "exclude"
        self._seed = verification.seed
        self._jury = Jury(mesh)
        self._scores = ContributionScores(mesh, verification)
        self._sketches = [GradientSketch(derive_seed(self._seed, "sketch", stage)) for stage in range(mesh.stages)]

    @property
    def audits(self) -> bool:
        """Whether contributions are recomputed."""
        return self._rate is not None

    def sketch(self, stage: int, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """The sketch of gradients of a stage's parameters, ``(SKETCHED,)`` float32 on their device, without waiting for it."""
        return self._sketches[stage](gradients, device)

    def judged(
        self, verdict: StepVerdict, contributions: Contributions, draws: Draws, plan: StepPlan, ledger: Ledger
    ) -> StepVerdict:
        """The verdict on a step's signals, with that on its contributions.

        Where a signal is a lie contributions are not looked at: they were computed from it, and the step is done again.

        Args:
            verdict: on the signals.
            contributions: of the step.
            draws: of the step.
            plan: the step's plan.
            ledger: who is banned, and whose votes do not count.
        """
        if self._rate is None or verdict.guilty or verdict.disputed:
            return verdict
        weights = weights_of_workers(plan)
        scored = None
        if contributions.sketches is not None:
            scored = self._scores.assess(contributions.sketches, weights, mask_of(plan.absent, self._mesh))
        scores = torch.zeros_like(weights) if scored is None else scored.score
        drawn = self._drawn(draws, ledger)
        wanted = (weights > 0) & ((scores > 1) | drawn.any(dim=0))
        cases: dict[ContributionCase, list[int] | None] = {}
        for stage, replica in wanted.nonzero().tolist():
            worker = Worker(stage, replica)
            lane = plan.wiring.lane(worker)
            if lane is not None:
                drawers = drawn[:, stage, replica].nonzero().flatten().tolist()
                cases[ContributionCase(lane, worker)] = None if scores[stage, replica] > 1 else drawers
        judged = self._jury.hear_contributions(cases, ledger.banned, ledger.muted, draws.coin, contributions.ask)
        verdict = with_contributions(verdict, list(cases), judged, scores, plan.wiring, plan.number)
        found = verdict.guilty | verdict.disputed
        if scored is not None and not (found and self._repeats):
            liars = mask_of(found, self._mesh)
            self._scores.learn(scored, (weights > 0) & ~liars, cleared=wanted & ~liars)
        return verdict

    def _drawn(self, draws: Draws, ledger: Ledger) -> Tensor:
        """``(replicas, stages, replicas)`` bool, whose contributions are audited whatever their scores, by the one that draws."""
        mesh = self._mesh
        unheard = {*ledger.banned, *ledger.muted}
        numbers = draws.uniform(mesh.by_stage, "contributions", mesh.replicas).view(mesh.stages, mesh.replicas, mesh.replicas)
        honest = honest_by_stage(mesh, ledger.banned, ledger.muted)
        chances = torch.tensor([chance_of_each(self._rate or 1.0, count) for count in honest], dtype=torch.float64)
        heard = ~mask_of(unheard, mesh)[..., None] & ~torch.eye(mesh.replicas, dtype=torch.bool)
        return ((numbers < chances[:, None, None]) & heard).movedim(1, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        return self._scores.state_dict() if self.audits else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._scores.load_state_dict(state)
