"""The same script under Lightning's launcher and under torchrun, each in new processes; and what it leaves behind."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import world
from tests.distributed.tasks import Classifier

LAUNCHERS = {
    "lightning": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", f"--master-port={world.free_port()}"],
}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_trains_logs_and_leaves_a_checkpoint_for_plain_lightning(launcher: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PYTHONPATH": str(world.ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [*LAUNCHERS[launcher], str(world.ROOT / "tests" / "distributed" / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stdout + done.stderr

    assert "2 stages x 2 replicas" in done.stdout
    with next(tmp_path.glob("lightning_logs/version_0/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    logged = set(rows[0])
    assert {"train_loss_step", "train_loss_epoch", "train_accuracy", "val_loss"} <= logged
    assert {"sentinel/anomaly_score", "sentinel/flags", "sentinel/banned", "sentinel/audits"} <= logged
    assert {"sentinel/anomaly_score/stage0/activation", "sentinel/anomaly_score/stage1/gradient"} <= logged

    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    module = Classifier.load_from_checkpoint(checkpoint, map_location="cpu")
    assert list(saved["state_dict"]) == list(Classifier().state_dict())
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(saved["optimizer_states"][0])
    moments = {name: optimizer.state[parameter]["exp_avg"].shape for name, parameter in module.named_parameters()}
    assert moments == {name: parameter.shape for name, parameter in module.named_parameters()}
