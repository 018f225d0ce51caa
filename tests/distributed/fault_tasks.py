"""Runs in which a worker's own layers compute something else, on either engine, and what they are to be equal to."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

import lightning_sentinel as ls
from lightning_sentinel.trust.verify_evidence import verify_evidence
from lightning_sentinel.verification.contributions import WEIGHT_GRADIENT
from tests.distributed import tasks

STEPS, BATCH, REPLICAS = 4, 4, 3
START, WORKER = 2, ls.Worker(1, 1)
FORWARD = {"name": "non_finite"}
WEIGHTS = {"name": "intermittent", "attack": "gradient_contribution", "probability": 1.0}

CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "forward": (FORWARD, {}, {}),
    "weights": (WEIGHTS, {}, {"gradient_clip_val": 0.05}),
    "accumulated": (WEIGHTS, {}, {"accumulate_grad_batches": 2}),
    "robust": (WEIGHTS, {"response": {"aggregation": "median"}}, {}),
    "sharded": (WEIGHTS, {"zero_stage": 1, "response": {"ban_after": None}}, {}),
    "tied": (WEIGHTS, {}, {}),
    "product": ({"name": "bit_flip", "bit": 0, "rate": 0.5}, {}, {}),
}
"""Attack, settings of the strategy, and of the Trainer."""


class Sharing(tasks.Classifier):
    """The first stage and the last have a weight in common."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.net[4].linear.weight = self.net[1].linear.weight


def faulty(engine: str, case: str) -> dict[str, Any]:
    attack, settings, options = CASES[case]
    virtual = engine == "virtual"
    response = ls.Response(audit_rate=None, **settings.get("response", {}))
    zero = {} if virtual else {"zero_stage": settings.get("zero_stage", 0)}
    strategy = ls.SentinelStrategy(
        2,
        REPLICAS,
        micro_batches=2,
        response=response,
        engine=engine,
        timeout=tasks.PATIENCE,
        **zero,  # type: ignore[arg-type]
    )
    module = (Sharing if case == "tied" else tasks.Classifier)("adamw")
    injector = ls.AttackInjector(attack, workers=[WORKER], start_step=START)
    data = tasks.loader(BATCH * REPLICAS) if virtual else tasks.loader(BATCH, REPLICAS)
    run = tasks.trainer(strategy, 1 if virtual else 2 * REPLICAS, STEPS, [injector], **options)
    run.fit(module, data)
    return {
        "weights": tasks.local_weights(module),
        "banned": sorted(strategy.ledger.banned),
        "flags": dict(strategy.ledger.flags),
        "found": {(one.step, one.worker, one.feature) for one in strategy.detections},
        "loss": float(run.callback_metrics["train_loss_step"]),
    }


CORRUPTED_FROM = 1
CORRUPTING: dict[ls.Worker, tuple[Any, Any]] = {
    ls.Worker(0, 2): ({"name": "gradient_contribution", "factor": -1.0}, "sign"),
    ls.Worker(1, 1): ({"name": "gradient_contribution", "factor": 1.0, "bias": 0.02},) * 2,
    ls.Worker(2, 0): ("sign", {"name": "gradient_contribution", "factor": 10.0}),
}
"""Workers of which all signals are honest, and what they add to weight gradients in the two batches from ``CORRUPTED_FROM`` on. No
fence would show the second."""
ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


class Each:
    """The attack of each of them in each batch."""

    site = "weights"

    def __call__(self, signal: Tensor, context: ls.attacks.AttackContext) -> Tensor:
        return ls.attacks.resolve(CORRUPTING[context.worker][context.step - CORRUPTED_FROM])(signal, context)


def corrupted(stages: int, replicas: int, engine: str) -> dict[str, Any]:
    """Two steps of two batches, clipped, where one worker of each stage corrupts its weight gradients, and all are recomputed."""
    virtual = engine == "virtual"
    strategy = ls.SentinelStrategy(
        stages,
        replicas,
        micro_batches=2,
        response=ls.Response(gradient_audit_rate=1.0),
        engine=engine,  # type: ignore[arg-type]
        timeout=tasks.PATIENCE,
    )
    module = Sharing("adamw")
    workers = [worker for worker in CORRUPTING if worker.stage < stages]
    injector = ls.AttackInjector(Each(), workers=workers, start_step=CORRUPTED_FROM)
    data = tasks.loader(BATCH * replicas) if virtual else tasks.loader(BATCH, replicas)
    tasks.trainer(strategy, 1 if virtual else stages * replicas, STEPS // 2, [injector], **ACCUMULATED).fit(module, data)
    return {
        "weights": tasks.local_weights(module),
        "banned": strategy.ledger.banned_at,
        "found": {(one.step, one.worker, one.feature, one.confirmed) for one in strategy.detections},
        "shown": {worker: (str(one.reason), verify_evidence(one).proves) for worker, one in strategy.evidence.items()},
    }


def check_corrupted(found: dict[str, Any], stages: int, replicas: int, weighs: bool = True) -> None:
    """Of three or four workers one is banned the second time that it is found out; before, it is left out of the step."""
    workers = [worker for worker in sorted(CORRUPTING) if worker.stage < stages]
    assert found["banned"] == dict.fromkeys(workers, CORRUPTED_FROM + 1)
    steps = (CORRUPTED_FROM, CORRUPTED_FROM + 1)
    assert found["found"] == {(step, worker, WEIGHT_GRADIENT, True) for worker in workers for step in steps}
    assert found["shown"] == dict.fromkeys(workers, ("false weight gradients", True))
    if weighs:
        alone = tasks.fit_alone("adamw", STEPS // 2, BATCH * replicas, ACCUMULATED, Sharing)["weights"]
        for name, value in found["weights"].items():
            assert (value - alone[name]).abs().max() <= 1e-5, name


def all_cases() -> dict[str, dict[str, Any]]:
    return {case: faulty("process", case) for case in CASES}


def finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in weights.values())


def is_number(value: float) -> bool:
    return not math.isnan(value) and not math.isinf(value)
