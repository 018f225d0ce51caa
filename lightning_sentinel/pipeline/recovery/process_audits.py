"""All that one process does in audits: what it draws, what it recomputes, and what it keeps to show for a ban."""

from __future__ import annotations

from typing import NamedTuple

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.pipeline.commitments.sealed_draws import SealedDraws
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.recovery.auditing import Audits
from lightning_sentinel.pipeline.recovery.contribution_audits import ContributionAudits
from lightning_sentinel.pipeline.recovery.evidence import BanEvidence
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.verification import SignalTable

__all__ = ["AuditsOfProcess"]


class AuditsOfProcess(NamedTuple):
    """The audits that a rank takes part in.

    Args:
        messages: of signals, rows and notes.
        contributions: of weight gradients.
        draws: which of these it draws.
        evidence: what they and other steps show against workers that are banned.
    """

    messages: Audits
    contributions: ContributionAudits
    draws: SealedDraws
    evidence: BanEvidence

    def begin(self, table: SignalTable, adversary: Adversary | None) -> None:
        """Begin to settle a step.

        Args:
            table: the step's rows.
            adversary: a simulated attacker, which may also lie in its votes.
        """
        self.messages.begin(table, adversary)
        self.contributions.begin(adversary)

    def shown(self, ruling: Ruling, commitments: StepCommitments) -> Ruling:
        """The ruling on the step with what its audits show against those that it bans."""
        in_rows = {worker: list(votes) for worker, votes in self.messages.on_rows.items()}
        for worker, votes in self.contributions.testimonies.items():
            in_rows.setdefault(worker, []).extend(votes)
        return self.evidence.of_audits(ruling, commitments, self.messages.testimonies, in_rows)
