"""What a step logs and predicts on the last stage is what it logs and predicts in one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import tasks, world


def test_logs_metrics_and_predictions_equal_those_of_one_process() -> None:
    batch_size, replicas = 6, 2
    ranks = world.run(tasks.logged_values, 2 * replicas, batch_size)
    alone = tasks.logged_values(batch_size * replicas)

    for rank in ranks:
        for name, value in alone["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(value, abs=1e-5), name
        assert rank["metrics"].keys() == alone["metrics"].keys()
    for key in ("logits", "labels"):
        expected = torch.cat([batch[key] for batch in alone["predictions"]])
        for rank in ranks:
            torch.testing.assert_close(torch.cat([batch[key] for batch in rank["predictions"]]), expected, atol=1e-5, rtol=0)
