"""What a run really did: errors against values that are known, and the norms that checkpoints keep."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_sentinel.benchmarks.detection.measures import measure
from lightning_sentinel.benchmarks.detection.rivals import workers_at_fault
from lightning_sentinel.benchmarks.detection.scenarios import Scenario, Training
from lightning_sentinel.benchmarks.detection.training import train_warmup
from lightning_sentinel.benchmarks.detection.truth import LARGEST, Truth, Work
from lightning_sentinel.mesh import Worker

BROKEN = Worker(1, 1)
TINY = Training(stages=3, replicas=3, micro_batches=1, warmup_steps=4, steps=4, width=16, sequence_length=16)


def test_the_error_is_that_of_the_norm_and_at_most_the_largest() -> None:
    truth = Truth()
    honest = torch.tensor([3.0, 4.0])
    truth(BROKEN, "weights", 2, 0, honest + torch.tensor([0.0, 0.5]), honest)
    truth(BROKEN, "weights", 1, 0, torch.full((2,), math.nan), honest)
    truth(BROKEN, "activation", 1, 0, 2 * torch.ones(3, 4), torch.ones(3, 4))
    truth(BROKEN, "gradient", 3, 0, torch.full((2, 2), math.nan), torch.full((2, 2), math.nan))
    first, second = truth.works
    assert (first.step, first.errors) == (1, (1.0, 0.0, LARGEST))
    assert (second.step, second.error) == (2, pytest.approx(0.1))


def test_of_a_step_that_is_done_again_the_larger_error_counts() -> None:
    truth = Truth()
    for factor in (1.0, 3.0, 2.0):
        truth(BROKEN, "weights", 0, 0, factor * torch.ones(4), torch.ones(4))
    assert [work.error for work in truth.works] == [2.0]


def test_a_row_is_the_work_again() -> None:
    work = Work(BROKEN, 7, 1, (0.1, 0.0, 0.3))
    assert Work.of(work.row) == work


def test_a_run_records_what_was_wrong_and_all_norms(tmp_path) -> None:
    fault = {"name": "bit_flip", "bit": 0, "phase": "backward_weight"}
    scenario = Scenario("audited", 0, TINY, attack="bit", spec=fault, direction="both", workers=((1, 1),))
    train_warmup(scenario, tmp_path / "warm.ckpt")
    found = measure(scenario, tmp_path / "warm.ckpt")
    works = [Work.of(row) for row in found.works]
    assert [work.step for work in works] == [4, 5, 6, 7] and workers_at_fault(works) == {BROKEN: 4}
    # The signals are honest, so no audit of them can find it.
    assert all(work.errors[:2] == (0.0, 0.0) and work.errors[2] > 0 for work in works)
    assert not found.banned_at and not found.flagged_at
    assert len(found.norms) == TINY.total_steps and all(norm for norm in found.norms)
