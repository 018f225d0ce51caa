"""A process holds its own stage, and little besides."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from lightning_sentinel.benchmarks.memory import LargeModel, largest_sum_of_tensors
from tests.distributed import world


@pytest.mark.parametrize(
    "model",
    [
        LargeModel(stages=2, replicas=1, width=256, depth=8),
        LargeModel(stages=1, replicas=2, width=640, depth=4),  # gradients that are large enough to have messages of their own
    ],
    ids=["stages", "replicas"],
)
def test_tensors_of_a_process_are_its_share_and_a_tenth(model: LargeModel) -> None:
    block = 4 * model.width**2 + 3 * model.width * (8 * -(-model.width // 3)) + 2 * model.width
    weights = model.depth * block + 2 * 256 * model.width + model.width
    (ranks, _) = world.run(largest_sum_of_tensors, 2, asdict(model))
    # Parameters, gradients, and two moments: four bytes each.
    assert sum(rank["share"] for rank in ranks) == pytest.approx(16 * weights * model.replicas, rel=1e-3)
    for rank in ranks:
        assert rank["share"] == pytest.approx(16 * weights / model.stages, rel=0.02)
        assert rank["share"] <= rank["tensors"] <= 1.1 * rank["share"]
