"""The verifiers of one process, and what they do in a step.

Both engines use it: a process of the real mesh guards the boundaries that it receives from, the virtual engine guards all. At
receipt a signal's *value* may change, never the control flow. Decisions that change what ranks do next are made once a step, by
all ranks from the same table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Boundary, Mesh, Worker
from lightning_sentinel.pipeline.recovery.audited_verdicts import AuditedVerdicts, Auditors
from lightning_sentinel.pipeline.recovery.contribution_checks import ContributionChecks
from lightning_sentinel.pipeline.recovery.reference_updates import Apart, ReferenceUpdates
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.seeds import derive_seed, secret_seed
from lightning_sentinel.verification import (
    BoundaryVerifier,
    Calibration,
    Ledger,
    SignalTable,
    StepVerdict,
    judge,
)
from lightning_sentinel.verification.calibration import Assessment
from lightning_sentinel.verification.contributions import Refusals, with_refusals, without_broken
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.projection import Projection, SecretDirections
from lightning_sentinel.verification.references import Contribution
from lightning_sentinel.verification.table import rows_by_sender
from lightning_sentinel.verification.tolerance import Tolerances
from lightning_sentinel.verification.verdicts import MUCH_FURTHER, behind
from lightning_sentinel.verification.verifier import Report
from lightning_sentinel.wiring import Wiring

__all__ = ["Guard"]

_SECRET = "secret/seed"
_CONTRIBUTIONS = "contributions/"


class Guard:
    """Verifies the signals that this process receives.

    Args:
        mesh: all workers.
        boundaries: the boundaries that this process receives from.
        worker: the worker that this process is; ``None`` if it runs the whole mesh.
        verification: how signals are verified.
        response: what follows from a flag.
        ledger: flags and bans; the same on all ranks.
        device: where signals are.
        secret: what all ranks have drawn together, of which directions are made where ``verification`` has no seed; ``None`` draws
            it here, for all workers in one process.
    """

    def __init__(
        self,
        mesh: Mesh,
        boundaries: Iterable[Boundary],
        worker: Worker | None,
        verification: Verification,
        response: Response,
        ledger: Ledger,
        device: torch.device,
        secret: int | None = None,
    ) -> None:
        self._mesh = mesh
        self._worker = worker
        self._device = device
        self._response = response
        rate = response.audit_rate_of(mesh)
        self._audited = None if rate is None else AuditedVerdicts(mesh, rate, compares_inputs=verification.method != "paper")
        self.ledger = ledger
        self.calibration = Calibration(mesh, verification)
        self.seed_of_draws = verification.seed
        """The seed of private draws in a repeatable run; ``None`` if each worker draws what nobody can foresee."""
        if verification.seed is None:
            verification = replace(verification, seed=secret_seed() if secret is None else secret)
        self.verifiers = {boundary: BoundaryVerifier(boundary, verification, device) for boundary in boundaries}
        self.tolerances = Tolerances(mesh, 0)
        self._keep_secret(verification)
        self._rows: dict[Boundary, list[tuple[Sequence[int], Tensor]]] = {boundary: [] for boundary in self.verifiers}
        self._updates = ReferenceUpdates()
        self._refusals = Refusals(mesh)

    def _keep_secret(self, verification: Verification) -> None:
        """Draw from the seed whatever workers must not know."""
        assert verification.seed is not None, "drawn before"
        self._secret = verification
        seed = verification.seed
        self._secrets: dict[Boundary, SecretDirections] = {}
        self.tolerances.seed = seed
        self.contributions = ContributionChecks(self._mesh, verification, self._response)
        for verifier in self.verifiers.values():
            verifier.use_secret(verification)

    @property
    def secret(self) -> int:
        """The seed that workers must not know."""
        assert self._secret.seed is not None, "drawn at the start"
        return self._secret.seed

    @property
    def audits(self) -> bool:
        """Whether signals are recomputed."""
        return self._audited is not None

    @property
    def compares_inputs(self) -> bool:
        """Whether signals are compared with the signals that their senders received."""
        return self._secret.method != "paper"

    @property
    def excludes(self) -> bool:
        """Whether flagged micro-batches are kept out of the weights at receipt. Audits decide at the end of the step instead."""
        return self._response.on_flag == "exclude" and not self.audits

    @property
    def replaces_malformed(self) -> bool:
        """Whether a malformed or non-finite signal is kept out of the weights, and its sender blamed."""
        return self._response.on_flag == "exclude"

    @property
    def refused(self) -> tuple[int, ...]:
        """How often each worker of this stage contributed non-finite values to a reference update. Other stages do not see this."""
        if self._worker is None:
            return ()
        return tuple(self._updates.refused[Worker(self._worker.stage, replica)] for replica in range(self._mesh.replicas))

    def lane_seed(self, step: int) -> int | None:
        """The seed that deals workers to lanes while one of them is a suspect, or contradicts others; ``None`` while none is."""
        # Shuffling singles out a worker that makes others look bad: it is out of line whichever workers share its lane.
        order = self.ledger.order(step) if self.replaces_malformed else None
        return None if order is None else derive_seed(self.secret, "lanes", order)

    def begin(self, plan: StepPlan) -> None:
        """Begin a training step."""
        self.tolerances.learning = self.calibration.steps < self._secret.warmup_steps
        if self.excludes and self.compares_inputs:
            lanes = self._lanes(plan.wiring) or [0]
            for boundary, verifier in self.verifiers.items():
                limits = [self._limit(plan.wiring.worker(boundary.sender, lane)) for lane in lanes]
                verifier.limits = torch.tensor(limits, device=self._device)

    def _limit(self, sender: Worker) -> float:
        """The score above which a sender's signal is left out at receipt, where no audit reviews what is left out.

        An honest signal is a little out of line every now and then, and should still count. A worker that was out of line for most
        of the previous step gets no such benefit of the doubt.
        """
        return 1.0 if sender in self.ledger.streaks else MUCH_FURTHER

    def _lanes(self, wiring: Wiring) -> list[int]:
        """The lanes that this process receives from."""
        if self._worker is None:
            return list(range(self._mesh.replicas))
        lane = wiring.lane(self._worker)
        return [] if lane is None else [lane]

    def project(self, boundary: Boundary, signal: Tensor) -> Projection | None:
        """The projection of what senders of ``boundary`` received on secret directions; ``None`` if inputs are not compared."""
        if not self.compares_inputs:
            return None
        if boundary not in self._secrets:
            self._secrets[boundary] = SecretDirections(boundary, self._secret, self._device)
        return self._secrets[boundary].project(signal)

    def receive(
        self,
        boundary: Boundary,
        signals: Tensor,
        tainted: Tensor,
        received: Projection | None = None,
        lanes: Tensor | None = None,
        replicas: Sequence[int] | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Verify the signals of one micro-batch; to be called in the order of micro-batches.

        Args:
            signals: ``(senders * B, ...)``: one sender's micro-batch, or one micro-batch of each replica's batch, or of the
                replicas whose signals share a shape.
            tainted: ``(senders,)`` bool, whether a verifier earlier in the pipeline flagged the micro-batch.
            received: the signals that the senders received, from :meth:`project`.
            lanes: ``(senders,)``, the lanes that the senders serve; ``None`` if in order.
            replicas: the replicas whose batches these are; ``None`` for all.
            report: what a simulated attacker reports in place of what it measured.

        Returns:
            the signals to go on with, and the taint to pass on.
        """
        verifier = self.verifiers[boundary]
        of = None if replicas is None else self._mesh.replicas
        rows, flagged = verifier.inspect(signals, tainted, received, lanes, of, report)
        self._rows[boundary].append((range(len(rows)) if replicas is None else replicas, rows))
        if self.audits:
            return signals, tainted
        tainted = tainted | flagged
        if self.excludes:
            samples = tainted.repeat_interleave(len(signals) // len(tainted))
            samples = samples.view(-1, *(1 for _ in signals.shape[1:]))
            signals = torch.where(samples, verifier.substitute(signals), signals)
        return signals, tainted

    def take_rows(self, boundary: Boundary) -> Tensor:
        """This step's rows of one boundary, ``(senders, receipts, len(COLUMNS))``, and forget them."""
        receipts = self._rows[boundary]
        self._rows[boundary] = []
        return rows_by_sender(receipts)

    def settle(
        self,
        table: SignalTable,
        plan: StepPlan,
        sum_over_replicas: Callable[[Tensor], Tensor],
        auditors: Auditors | None = None,
        apart: Apart | None = None,
        broken: Tensor | None = None,
        refused: Tensor | None = None,
    ) -> Ruling:
        """Judge the step, enter it into the ledger, and learn from it.

        Args:
            table: the step's signals, the same on all ranks.
            plan: the step's plan.
            sum_over_replicas: adds a vector over the replicas of this stage.
            auditors: of the step; ``None`` without audits.
            apart: gathers a vector from each replica of this stage; ``None`` if all replicas are in this process.
            broken: ``(stages, lanes, micro_batches)`` bool, whether the weight gradients are unusable; ``None`` if not checked.
            refused: ``(stages, replicas, replicas)``, :attr:`refused` as each rank reports it; ``None`` if not checked.
        """
        wiring = plan.wiring
        step = plan.number
        excludes = self.replaces_malformed
        assessment = self.calibration.assess(table, wiring, self.ledger.banned_senders(self._mesh))
        heights = self.calibration.heights(wiring)
        if auditors is not None:
            assert self._audited is not None, "where workers are asked, signals are audited"
            verdict = self._audited.judge(table, assessment, heights, plan, auditors, self.ledger)
            if auditors.contributions is not None:
                verdict = self.contributions.judged(verdict, auditors.contributions, auditors.draws, plan, self.ledger)
            exonerated = Counter(detection.worker for detection in verdict.detections if detection.confirmed is False)
            found = verdict.audits, verdict.flagged, exonerated, verdict.guilty, verdict.outvoted
            banned = self.ledger.record_audits(step, *found, self._mesh)
        else:
            assessment = self.calibration.as_far_as_known(assessment)
            verdict = judge(table, assessment, heights, self._mesh, wiring, step, excludes)
            scores = {one.worker: one.score for one in sorted(verdict.detections, key=lambda one: one.score)}
            observed = verdict.flagged, verdict.suspects, verdict.verified
            banned = self.ledger.record(step, *observed, self._mesh, verdict.unmistakable, scores)
        excluded = sorted(verdict.guilty | verdict.disputed) if excludes else []
        if broken is not None and excludes and not excluded:
            # Only in a step that is kept: where a step is undone, broken gradients are mostly what a lie caused.
            finite = (table.column("worst") >= 0).all(dim=0)
            verdict, left_out = without_broken(verdict, broken, finite, self._mesh, wiring, step)
            self.ledger.flags.update(left_out)
        if refused is not None:
            news = self._refusals.news(refused, self.ledger.banned)
            verdict = with_refusals(verdict, news, step)
            self.ledger.flags.update(news)
        if banned or excluded:
            # Workers behind a liar are not to blame for how their signals looked.
            self.calibration.forget_sums(behind(wiring.sent_by({*banned, *excluded}, self._mesh), self._mesh), wiring)
        if excluded:
            self.forget_step()
        else:
            self._learn(table, verdict, assessment, wiring, sum_over_replicas, apart)
            self.calibration.learn(verdict.table, verdict.honest, verdict.heard, verdict.explained, assessment, wiring)
            self._put_fences()
        redo = bool(excluded) and any(Wiring.of(self._mesh, plan.absent.union(banned, excluded)).live)
        return Ruling(verdict, banned, excluded, redo=redo, plan=plan)

    def forget_step(self) -> None:
        """Discard the step's rows and sums: the step will be repeated, or left out of the training."""
        for verifier in self.verifiers.values():
            verifier.forget_step()
        for rows in self._rows.values():
            rows.clear()

    def _learn(
        self,
        table: SignalTable,
        verdict: StepVerdict,
        assessment: Assessment,
        wiring: Wiring,
        sum_over_replicas: Callable[[Tensor], Tensor],
        apart: Apart | None,
    ) -> None:
        contributions: dict[Boundary, Contribution] = {}
        for boundary, verifier in self.verifiers.items():
            index = self._mesh.boundaries.index(boundary)
            flagged = table.flagged[index]
            honest = verdict.honest[index]
            known = assessment.valid[index] & ~flagged
            # A sender's signals cannot be subtracted from its sum again: the sum counts only if all of them are honest.
            unflagged_ones = ~(known & ~honest).any(dim=1)
            flagged_ones = (flagged & honest).any(dim=1) & ~(flagged & ~honest).any(dim=1)
            lanes = self._lanes(wiring)
            if not lanes:
                self._stand_by(boundary, table)
                lanes = [0]
            mine = verifier.contribution(unflagged_ones[lanes], flagged_ones[lanes])
            if honest.any():
                # As long as any replica's longest honest signal: positions that only a tainted signal has are not to be learned.
                positions = table.column("positions")[index][honest].max()
                contributions[boundary] = mine.resized(int(positions))
        references = [self.verifiers[boundary].references for boundary in contributions]
        sizes = [self.verifiers[boundary].sizes for boundary in contributions]
        summed = self._updates.of_step(list(contributions.values()), references, sizes, sum_over_replicas, apart)
        learned = dict(zip(contributions, summed))
        for boundary, verifier in self.verifiers.items():
            verifier.learn(learned.get(boundary))

    def _stand_by(self, boundary: Boundary, table: SignalTable) -> None:
        """Prepare a worker without a lane to learn what the others of its stage learn: it may serve a lane later."""
        before = self._mesh.before(boundary)
        positions, channels = (
            int(table.column(name)[self._mesh.boundaries.index(boundary)].max()) for name in ("positions", "channels")
        )
        received = None
        if before is not None and self.compares_inputs:
            received = int(table.column("channels")[self._mesh.boundaries.index(before)].max())
        self.verifiers[boundary].stand_by(positions, channels, received)

    def _put_fences(self) -> None:
        known = self.calibration.knows_enough(torch.zeros(len(self._mesh.boundaries), dtype=torch.bool))
        for boundary, verifier in self.verifiers.items():
            index = self._mesh.boundaries.index(boundary)
            fences = self.calibration.fences_at_receipt(index)
            if self.excludes and not known[index]:
                fences = Fences.open(len(FEATURES))
            verifier.fences = fences.to(self._device)

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned about the boundaries that this process guards, keyed by boundary, and the secret it was learned with."""
        learned = {
            f"{boundary.name}/{name}": value
            for boundary, verifier in self.verifiers.items()
            for name, value in (verifier.state_dict() | self.calibration.state_of(self._mesh.boundaries.index(boundary))).items()
        }
        if learned:
            learned[_SECRET] = torch.tensor(self.secret)
            learned |= {f"{_CONTRIBUTIONS}{name}": value for name, value in self.contributions.state_dict().items()}
        return learned

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what was learned; boundaries that are not in the state start afresh.

        Args:
            state: the state of all boundaries, not only of those that this process guards.
        """
        for index, boundary in enumerate(self._mesh.boundaries):
            prefix = f"{boundary.name}/"
            mine = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if mine and "among_peers.usual" not in mine:
                raise ConfigurationError(
                    f"What the checkpoint says of {boundary.name} is not what this version's verifiers learn: {sorted(mine)[:3]}."
                    " Load its weights with load_from_checkpoint and start a new run, or resume with the version that wrote it."
                )
            if mine:
                self.calibration.load_state_of(index, mine)
                if boundary in self.verifiers:
                    self.verifiers[boundary].load_state_dict(mine)
        if _SECRET in state:
            # With this run's own secret the loaded values would mean nothing: they were measured along other directions.
            self._keep_secret(replace(self._secret, seed=int(state[_SECRET])))
        said = {name.removeprefix(_CONTRIBUTIONS): value for name, value in state.items() if name.startswith(_CONTRIBUTIONS)}
        self.contributions.load_state_dict(said)
        self._put_fences()
