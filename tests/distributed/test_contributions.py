"""Who sends honest signals and corrupts weight gradients is found by processes that recompute them, before any weight has moved."""

from __future__ import annotations

from typing import Any

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from tests.distributed import tasks, world

MESH = Mesh(2, 3)
BATCH, STEPS, START = 4, 4, 1
LIARS = {
    ls.Worker(0, 2): {"name": "gradient_contribution", "factor": -1.0},
    ls.Worker(1, 1): {"name": "gradient_contribution", "factor": 1.0, "bias": 0.02},
}
"""One of each stage. What the middle one adds no fence would show."""
OPTIONS = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


def attacked() -> dict[str, Any]:
    response = ls.Response(gradient_audit_rate=1.0)
    strategy = ls.SentinelStrategy(MESH.stages, MESH.replicas, micro_batches=2, response=response, timeout=tasks.PATIENCE)
    module = tasks.Classifier("adamw")
    injector = ls.AttackInjector(Each(), workers=list(LIARS), start_step=START)
    run = tasks.trainer(strategy, MESH.size, STEPS // 2, [injector], **OPTIONS)
    run.fit(module, tasks.loader(BATCH, MESH.replicas))
    return {
        "weights": tasks.local_weights(module),
        "banned": strategy.ledger.banned_at,
        "found": {(one.step, one.worker, one.confirmed) for one in strategy.detections},
    }


class Each:
    """The attack of each liar."""

    site = "weights"

    def __call__(self, signal: Any, context: Any) -> Any:
        return ls.attacks.resolve(LIARS[context.worker])(signal, context)


def test_weights_are_those_of_a_clean_run() -> None:
    ranks = world.run(attacked, MESH.size, timeout=100)
    alone = tasks.fit_alone("adamw", STEPS // 2, BATCH * MESH.replicas, OPTIONS)["weights"]
    seen = set[str]()
    for number, rank in enumerate(ranks):
        # Of four workers one is banned the second time that it is found out; the first time it is left out of the step.
        assert rank["banned"] == dict.fromkeys(sorted(LIARS), START + 1)
        assert rank["found"] == {(step, worker, True) for worker in LIARS for step in (START, START + 1)}
        if MESH.worker(number) not in LIARS:
            seen |= set(rank["weights"])
            for name, value in rank["weights"].items():
                assert (value - alone[name]).abs().max() <= 1e-5, name
    assert seen == set(alone)
