"""Signals of a cluster, and checkpoints in the middle of a step."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed import signal_tasks, world


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path: Path) -> None:
    requeue = tmp_path / "scontrol"
    requeue.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    requeue.chmod(0o755)
    ranks = world.run(signal_tasks.requeued_and_ended, 4, str(tmp_path), timeout=100)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    for found in ranks:
        assert found["ended"] == "SIGTERMException"
        assert not found["agreements"], "the note travels with the step"
        assert found["files"] == ["ended.ckpt", "hpc_ckpt_1.ckpt"]
        for name in ("signalled", "resumed"):
            torch.testing.assert_close(found[name], found["unbroken"], rtol=0, atol=0)
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3
    assert torch.load(tmp_path / "ended.ckpt", weights_only=True)["global_step"] == 3


def test_a_step_that_saves_a_checkpoint_is_told_where_to_do_it() -> None:
    results, failures = world.outcomes(signal_tasks.saved_in_a_step, 2)
    assert not results
    refused = [failure for failure in failures.values() if failure.kind == "ConfigurationError"]
    assert len(refused) == 1
    assert "in the middle of a step" in refused[0].message and "on_train_batch_end" in refused[0].message
    others = [failure for failure in failures.values() if failure.kind == "WorkerLostError"]
    assert len(others) == 1 and "failed with ConfigurationError" in others[0].message
