"""Runs in which a worker's own layers compute something else, on either engine, and what they are to be equal to."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

import lightning_sentinel as ls
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


def all_cases() -> dict[str, dict[str, Any]]:
    return {case: faulty("process", case) for case in CASES}


def finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in weights.values())


def is_number(value: float) -> bool:
    return not math.isnan(value) and not math.isinf(value)
