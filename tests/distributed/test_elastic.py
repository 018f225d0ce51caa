"""Under torchrun with restarts a run goes on from its last checkpoint on the machines that are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import world


@pytest.mark.timeout(170)
def test_a_run_that_loses_a_machine_goes_on_from_its_last_checkpoint_on_a_smaller_mesh(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PYTHONPATH": str(world.ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    endpoint = f"127.0.0.1:{world.free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=3"]
    # The store must outlive the machine that is lost, so it is that of the first.
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=elastic"]
    command += ["--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"]
    script = [str(world.ROOT / "tests" / "distributed" / "elastic_script.py"), str(tmp_path), "3"]

    def node(number: int) -> subprocess.Popen[str]:
        host = ["--rdzv-conf", command[-1].removeprefix("--rdzv-conf=") + f",is_host={1 - number}"]
        return subprocess.Popen(
            [*command[:-1], *host, *script],
            env=environment,
            cwd=tmp_path,
            stdout=(tmp_path / f"{number}.out").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    nodes = [node(0), node(1)]
    try:
        code = nodes[0].wait(timeout=150)
    finally:
        for process in nodes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "0.out").read_text()
    assert code == 0, said[-4000:]
    assert (tmp_path / "died").exists() and nodes[1].returncode == -signal.SIGKILL
    assert "begins with 4 processes from nothing" in said
    assert "begins with 2 processes from the last checkpoint" in said
    assert "The checkpoint was written on 2 stages x 2 replicas. This run has 2 x 1." in said
    assert "ends at epoch 3 on Mesh(stages=2, replicas=1)" in said
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    # Eight steps an epoch of 96 samples and 12 a step; then sixteen an epoch with half the workers.
    assert saved["epoch"] == 2 and saved["global_step"] == 8 + 2 * 16
