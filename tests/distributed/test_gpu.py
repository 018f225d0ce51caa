"""What only a GPU can show. Run by ``make test-gpu``; skipped without one."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

import lightning_sentinel as ls
from tests.distributed import tasks, world
from tests.distributed.test_parity import TOLERANCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def fit_on_gpu(stages: int, replicas: int, steps: int, devices: Any) -> dict[str, Any]:
    strategy = ls.SentinelStrategy(stages=stages, replicas=replicas, micro_batches=3, verification=ls.Verification(warmup_steps=50))
    module = tasks.Classifier("sgd")
    run = L.Trainer(
        strategy=strategy,
        accelerator="gpu",
        devices=devices,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    run.fit(module, tasks.loader(6, replicas))
    return {
        "weights": {name: value.cpu() for name, value in tasks.local_weights(module).items()},
        "device": str(strategy.root_device),
    }


def test_one_worker_on_a_gpu_gives_the_weights_of_the_cpu() -> None:
    (rank,) = world.run(fit_on_gpu, 1, 1, 1, 4, 1, timeout=100)
    alone = tasks.fit_alone("sgd", 4, 6, {})
    assert rank["device"].startswith("cuda")
    for name, value in alone["weights"].items():
        assert (rank["weights"][name] - value).abs().max() <= 10 * TOLERANCE["sgd"], name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_stages_on_two_gpus_give_the_weights_of_the_cpu() -> None:
    ranks = world.run(fit_on_gpu, 2, 2, 1, 4, 2, timeout=100)
    alone = tasks.fit_alone("sgd", 4, 6, {})
    for rank in ranks:
        for name, value in rank["weights"].items():
            assert (value - alone["weights"][name]).abs().max() <= 10 * TOLERANCE["sgd"], name
