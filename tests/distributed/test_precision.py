"""In every precision that Lightning's DDP has: the weights are those of a single process, and signals are verified."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

import lightning_sentinel as ls
from tests.distributed import tasks, world

STAGES, REPLICAS, BATCH, STEPS = 2, 2, 6, 5
AUDITED = 3
"""Replicas of the run in which somebody lies: the fewest of whom an audit bans anybody."""
LARGE = 2.0**20
"""A factor with which some steps overflow, until it is small enough."""
PRECISIONS = ["bf16-mixed", "bf16-true", "16-mixed"]
HOW_CLOSE = {"bf16-mixed": 2e-3, "bf16-true": 2e-2, "16-mixed": 5e-4}
"""Micro-batches are added up in another order than a batch, in eight or eleven bits."""


def options(precision: str, scale: float) -> dict[str, Any]:
    if precision != "16-mixed":
        return {"precision": precision, "gradient_clip_val": 0.5}
    # Lightning knows it on GPUs only; torch on CPUs as well.
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 0.5}


def fit(precision: str, scale: float = 1024.0, **settings: Any) -> dict[str, Any]:
    settings = {"verification": None, "timeout": tasks.PATIENCE} | settings
    strategy = ls.SentinelStrategy(STAGES, REPLICAS, micro_batches=3, **settings)
    module = tasks.Classifier("sgd")
    run = tasks.trainer(strategy, STAGES * REPLICAS, STEPS, **options(precision, scale))
    run.fit(module, tasks.loader(BATCH, REPLICAS))
    scaler = getattr(run.precision_plugin, "scaler", None)
    return {
        "weights": tasks.local_weights(module),
        "loss": float(run.callback_metrics["train_loss_step"]),
        "scale": None if scaler is None else scaler.state_dict()["scale"],
        "flags": strategy.ledger.total_flags,
    }


def dtypes_inside() -> set[torch.dtype]:
    """What the layers of a stage compute in, where they are trained, evaluated and audited."""
    seen: set[torch.dtype] = set()
    response = ls.Response(audit_rate=1.0)
    strategy = ls.SentinelStrategy(STAGES, REPLICAS, micro_batches=3, response=response, timeout=tasks.PATIENCE)
    module = tasks.Classifier("sgd")
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    run = tasks.trainer(strategy, STAGES * REPLICAS, 2, precision="bf16-mixed", limit_val_batches=1)
    # As autocast does on GPUs, and on CPUs not: DeepSpeed's own forward pass would see it, and end the autocast that it finds.
    torch.set_autocast_enabled("cuda", True)
    try:
        run.fit(module, tasks.loader(BATCH, REPLICAS), tasks.loader(BATCH, REPLICAS))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert strategy.ledger.audits > 0 and not strategy.ledger.banned
    return seen


def fit_all() -> dict[str, Any]:
    found: dict[str, Any] = {precision: fit(precision) for precision in PRECISIONS}
    found["inside"] = dtypes_inside()
    found["overflow"] = fit("16-mixed", scale=LARGE)
    found["overflow, ZeRO"] = fit("16-mixed", scale=LARGE, zero_stage=1)
    for precision in ("bf16-mixed", "bf16-true"):
        found[f"verified {precision}"] = fit(precision, verification=ls.Verification(warmup_steps=100))
    return found


def alone(precision: str, scale: float = 1024.0) -> dict[str, Any]:
    module = tasks.Classifier("sgd")
    run = tasks.trainer("auto", 1, STEPS, **options(precision, scale))
    run.fit(module, tasks.loader(BATCH * REPLICAS))
    scaler = getattr(run.precision_plugin, "scaler", None)
    return {
        "weights": tasks.local_weights(module),
        "loss": float(run.callback_metrics["train_loss_step"]),
        "scale": None if scaler is None else scaler.state_dict()["scale"],
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return world.run(fit_all, STAGES * REPLICAS, timeout=80)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_weights_are_those_of_one_process(ranks: list[dict[str, Any]], precision: str) -> None:
    expected, seen = alone(precision), set()
    for rank in ranks:
        found = rank[precision]
        assert math.isclose(found["loss"], expected["loss"], rel_tol=0.02)
        assert found["scale"] == expected["scale"]
        for name, value in found["weights"].items():
            seen.add(name)
            assert value.dtype == expected["weights"][name].dtype
            assert (value - expected["weights"][name]).abs().max() <= HOW_CLOSE[precision], name
    assert seen == set(expected["weights"])


def test_a_step_that_overflows_on_one_stage_is_skipped_by_all(ranks: list[dict[str, Any]]) -> None:
    """The factor is halved until nothing overflows any more, on all ranks at the same steps, and as on one process."""
    scales = {rank["overflow"]["scale"] for rank in ranks}
    assert len(scales) == 1
    assert scales.pop() == alone("16-mixed", LARGE)["scale"] < LARGE
    for rank in ranks:
        assert all(bool(value.isfinite().all()) for value in rank["overflow"]["weights"].values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_verification_leaves_the_weights_as_they_are(ranks: list[dict[str, Any]], precision: str) -> None:
    for rank in ranks:
        plain, verified = rank[precision], rank[f"verified {precision}"]
        assert verified["flags"] == 0
        for name, value in plain["weights"].items():
            assert torch.equal(value, verified["weights"][name]), name


def test_layers_compute_in_the_precision_that_was_asked_for(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["inside"] == {torch.bfloat16}


def lie(signal: torch.Tensor, context: Any) -> torch.Tensor:
    """Of a size that rounding in bfloat16 has not, nor any feature sees."""
    return signal * 1.1


def audited() -> dict[str, Any]:
    found = {}
    for precision in ("bf16-mixed", "bf16-true"):
        response = ls.Response(audit_rate=1.0)
        strategy = ls.SentinelStrategy(STAGES, AUDITED, micro_batches=3, response=response, timeout=tasks.PATIENCE)
        injector = ls.AttackInjector(lie, workers=[ls.Worker(1, 1)], start_step=2)
        run = tasks.trainer(strategy, STAGES * AUDITED, 4, [injector], precision=precision)
        run.fit(tasks.Classifier("sgd"), tasks.loader(BATCH, AUDITED))
        found[precision] = dict(strategy.ledger.banned_at)
    return found


def test_audits_tell_a_lie_from_rounding() -> None:
    for rank in world.run(audited, STAGES * AUDITED, timeout=60):
        # Found out in step 2, and banned the second time.
        assert rank == {precision: {ls.Worker(1, 1): 3} for precision in ("bf16-mixed", "bf16-true")}


def test_with_zero_too_a_step_that_overflows_is_skipped_by_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found, expected = rank["overflow, ZeRO"], rank["overflow"]
        assert found["scale"] == expected["scale"] < LARGE
        for name, value in found["weights"].items():
            assert torch.equal(value, expected["weights"][name]), name
