"""What is measured on one run."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from lightning_sentinel.attacks import Site
from lightning_sentinel.benchmarks.detection.backdoor import armed, backdoor_success, success_in_copies
from lightning_sentinel.benchmarks.detection.insiders import Insider, Within
from lightning_sentinel.benchmarks.detection.scenarios import Scenario, Training
from lightning_sentinel.benchmarks.detection.training import LanguageModel, fit, make_strategy, validation_loss
from lightning_sentinel.benchmarks.detection.truth import GradientNorms, Truth
from lightning_sentinel.callbacks import AttackInjector
from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.metrics import DetectionF1, DetectionPrecision, DetectionRecall
from lightning_sentinel.strategy import SentinelStrategy
from lightning_sentinel.verification.reports import NOTE, ROW

__all__ = ["Measures", "measure"]


@dataclass(frozen=True)
class Measures:
    """What came of a run; steps, signals and audits are those of the part under attack.

    Args:
        guilty: the malicious workers, as pairs of stage and replica.
        banned_at: stage, replica and step of every ban.
        precision: share of the banned that were guilty, 1 if nobody was banned.
        recall: share of the guilty that were banned, 1 if nobody was guilty.
        f1: their harmonic mean.
        iterations: steps that each banned guilty worker had tampered in, the one of its ban included.
        false_bans: how many honest workers were banned.
        honest_signals: signals of honest workers that were verified.
        honest_flagged: those of them that were flagged, whether or not an audit cleared them.
        tampered_signals: signals of guilty workers, in the direction that is attacked, that were verified.
        tampered_flagged: those of them that were flagged.
        audits: signals that were recomputed.
        signals: all signals of the mesh.
        steps: how many there were.
        validation_loss: at the end; ``None`` if it is not finite.
        seconds_per_step: of wall-clock time.
        flagged_at: stage, replica and step of the first flag of every guilty worker that no audit cleared.
        works: what guilty workers made that was wrong, as rows of :class:`Work`.
        backdoor: share of held-out windows with the trigger that the weights at the end answer with the target.
        backdoor_in_copies: the same of weights in which malicious workers that are still there give their own copies of their
            stages'; ``None`` if they have none.
        norms: of the gradients of every step, the warm-up included; ``None`` where one is not finite.
    """

    guilty: list[list[int]]
    banned_at: list[list[int]]
    precision: float
    recall: float
    f1: float
    iterations: list[int]
    false_bans: int
    honest_signals: int
    honest_flagged: int
    tampered_signals: int
    tampered_flagged: int
    audits: int
    signals: int
    steps: int
    validation_loss: float | None
    seconds_per_step: float
    flagged_at: list[list[int]] = field(default_factory=list)
    works: list[list[float]] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    backdoor: float = 0.0
    backdoor_in_copies: float | None = None


def measure(scenario: Scenario, warmup: Path | None, vectors: Path | None = None) -> Measures:
    """Run a scenario, from the checkpoint of its warm-up or, without one, from the start.

    Args:
        vectors: the task vectors of its attackers, if they move weights.
    """
    training = scenario.training
    strategy = make_strategy(scenario)
    module = LanguageModel(training, scenario.seed)
    observer = _Observer(training, scenario.direction)
    callbacks: list[L.Callback] = [observer, observer.norms]
    if scenario.attacked:
        attack = scenario.make_attack() if vectors is None else armed(scenario.spec, torch.load(vectors))
        observer.injector = AttackInjector(
            attack,
            workers=scenario.workers,
            fraction=scenario.fraction,
            start_step=training.warmup_steps,
            direction=scenario.direction,  # type: ignore[arg-type]
            seed=scenario.seed,
        )
        callbacks.insert(0, observer.injector)
        if isinstance(attack, Insider):
            callbacks.insert(1, Within(attack))
    fit(scenario, strategy, module, training.total_steps, callbacks, warmup)
    loss = validation_loss(module)
    measured = observer.measures(strategy, loss if math.isfinite(loss) else None)
    return replace(measured, backdoor=backdoor_success(module), backdoor_in_copies=_in_copies(module, strategy))


def _in_copies(module: LanguageModel, strategy: SentinelStrategy) -> float | None:
    adversary = strategy.adversary
    at_large = set() if adversary is None else adversary.liars(Site.OWN_WEIGHTS) - strategy.ledger.banned
    return None if adversary is None or not at_large else success_in_copies(module, adversary, at_large, strategy.step - 1)


@dataclass
class _Observer(L.Callback):
    """Counts what was verified, step by step."""

    training: Training
    direction: str
    injector: AttackInjector | None = None
    truth: Truth = field(default_factory=Truth)
    norms: GradientNorms = field(default_factory=GradientNorms)
    honest: int = 0
    tampered: int = 0
    steps: int = 0
    audits_before: int = 0
    began: float = field(default=0.0)
    ended: float = field(default=0.0)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, SentinelStrategy)
        if strategy.adversary is not None:
            strategy.adversary.witness = self.truth

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, SentinelStrategy)
        if strategy.step == self.start:
            self.audits_before = strategy.ledger.audits
            self.began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, SentinelStrategy)
        # The strategy counts a step as soon as its verdicts are drawn.
        if strategy.step <= self.start:
            return
        self.steps += 1
        self.ended = time.perf_counter()
        if strategy.table is None:
            return
        at_large = self.guilty - {worker for worker, step in strategy.ledger.banned_at.items() if step < strategy.step - 1}
        verified = (~strategy.table.tainted).sum(dim=2)
        assert strategy.wiring is not None
        for boundary, counts in zip(strategy.mesh.boundaries, verified.tolist()):
            for lane, count in enumerate(counts):
                if strategy.wiring.worker(boundary.sender, lane) not in at_large:
                    self.honest += count
                elif self.tampers_with(boundary.direction):
                    self.tampered += count

    @property
    def start(self) -> int:
        return self.training.warmup_steps

    @property
    def guilty(self) -> frozenset[Worker]:
        return frozenset() if self.injector is None else self.injector.workers

    def tampers_with(self, direction: Direction) -> bool:
        return self.direction in ("both", direction.value)

    def measures(self, strategy: SentinelStrategy, loss: float | None) -> Measures:
        mesh = strategy.mesh
        ledger = strategy.ledger
        guilty = self.guilty
        seen = [detection for detection in strategy.detections if detection.step >= self.start]
        sent = [one for one in seen if one.feature not in (ROW, NOTE)]
        mine = [one for one in sent if one.worker in guilty and self.tampers_with(one.direction) and one.confirmed is not False]
        flagged: dict[Worker, int] = {}
        for one in mine:
            flagged[one.worker] = min(one.step, flagged.get(one.worker, one.step))
        precision, recall, f1 = _scores(ledger.banned, guilty, mesh)
        return Measures(
            guilty=[[worker.stage, worker.replica] for worker in sorted(guilty)],
            banned_at=[[worker.stage, worker.replica, step] for worker, step in sorted(ledger.banned_at.items())],
            precision=precision,
            recall=recall,
            f1=f1,
            iterations=[step - self.start + 1 for worker, step in sorted(ledger.banned_at.items()) if worker in guilty],
            false_bans=len(ledger.banned - guilty),
            honest_signals=self.honest,
            honest_flagged=sum(one.worker not in guilty for one in seen),
            tampered_signals=self.tampered,
            tampered_flagged=len(mine),
            audits=ledger.audits - self.audits_before,
            signals=len(mesh.boundaries) * mesh.replicas * self.training.micro_batches * self.steps,
            steps=self.steps,
            validation_loss=loss,
            seconds_per_step=(self.ended - self.began) / max(1, self.steps),
            flagged_at=[[worker.stage, worker.replica, step] for worker, step in sorted(flagged.items())],
            works=[work.row for work in self.truth.works],
            norms=self.norms.norms,
        )


def _scores(banned: Collection[Worker], guilty: Collection[Worker], mesh: Mesh) -> tuple[float, float, float]:
    scores = []
    for metric in (DetectionPrecision, DetectionRecall, DetectionF1):
        one = metric(mesh.stages, mesh.replicas)
        one.update(banned, guilty)
        scores.append(float(one.compute()))
    return scores[0], scores[1], scores[2]
