"""Runs on a virtual mesh in which signals are audited: what tests of audits and of evidence look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

import lightning_sentinel as ls
from lightning_sentinel.attacks import AttackContext
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.verification.jury import Subject
from tests.distributed import tasks

STAGES, REPLICAS, MICRO_BATCHES = 3, 5, 2
BOUNDARIES = 2 * (STAGES - 1)
SIGNALS = BOUNDARIES * REPLICAS * MICRO_BATCHES
START = 3
"""The first step that is tampered with: in the warm-up, in which nobody is flagged."""
BATCH = 20

Attack = Callable[[Tensor, AttackContext], Tensor]


class Attempts(L.Callback):
    """Listens to an engine: how often steps were trained, and what was audited in each attempt."""

    def __init__(self) -> None:
        self.audited: list[Tensor] = []
        """Of every attempt, ``(boundaries, replicas, micro_batches)``, by samples."""
        self.steps: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        engine = trainer.strategy._run.engine  # type: ignore[attr-defined]
        run, settle = engine.run, engine.guard.settle
        boundaries = trainer.strategy.mesh.boundaries  # type: ignore[attr-defined]

        def counted(plan: StepPlan, *rest: Any) -> Any:
            self.steps.append(plan.number)
            self.audited.append(torch.zeros(BOUNDARIES, REPLICAS, MICRO_BATCHES, dtype=torch.bool))
            return run(plan, *rest)

        def listened(table: Any, plan: StepPlan, total: Any, auditors: Any, **more: Any) -> Any:
            def heard(asked: Any) -> Any:
                for case, _ in asked:
                    if case.subject is Subject.SIGNAL:
                        self.audited[-1][(boundaries.index(case.boundary), *case.micro_batch_id)] = True
                return auditors.ask(asked)

            return settle(table, plan, total, None if auditors is None else auditors._replace(ask=heard), **more)

        engine.run, engine.guard.settle = counted, listened


class Run:
    """A trained module, with all that was noticed on the way."""

    def __init__(
        self,
        attacks: Any = None,
        workers: Sequence[ls.Worker] = (),
        *,
        module: L.LightningModule | None = None,
        rate: float | None = 1.0,
        steps: int = START + 3,
        warmup: int = 100,
        response: dict[str, Any] | None = None,
        start: int = START,
        more: Sequence[L.Callback] = (),
        **options: Any,
    ) -> None:
        options = dict(options)
        self.source, batches = options.pop("ckpt_path", None), options.pop("batches", 6)
        verification = ls.Verification(warmup_steps=warmup, seed=0)
        self.strategy = ls.SentinelStrategy(
            STAGES,
            REPLICAS,
            micro_batches=MICRO_BATCHES,
            engine="virtual",
            verification=verification,
            response=ls.Response(audit_rate=rate, **(response or {})),
        )
        self.module, self.attempts = module or tasks.Classifier("adamw"), Attempts()
        injector = [] if attacks is None else [ls.AttackInjector(attacks, workers=workers, start_step=start)]
        self.trainer = tasks.trainer(self.strategy, 1, steps, [*injector, *more, self.attempts], **options)
        L.seed_everything(5, verbose=False)
        self.trainer.fit(self.module, tasks.loader(BATCH, samples=batches * BATCH), ckpt_path=self.source)

    @property
    def ledger(self) -> Any:
        return self.strategy.ledger

    @property
    def weights(self) -> dict[str, Tensor]:
        return tasks.local_weights(self.module)


def assert_same_weights(one: Run, other: Run, tolerance: float = 1e-6) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        torch.testing.assert_close(other.weights[name], value, rtol=0, atol=tolerance, msg=name)


LIARS = [ls.Worker(1, 0), ls.Worker(1, 3)]
ATTACKS: dict[str, Any] = {
    "loud": {"name": "scale", "factor": 50.0},
    "hardly noticeable": {"name": "add_noise", "strength": 0.02},
    "not finite": lambda signal, context: signal * torch.nan,
}
