"""The commands and the module of the README, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import world


def run(command: list[str], directory: Path) -> str:
    dropped = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_module_of_the_readme_trains(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(import lightning as L\nimport torch\n.*?)```", (world.ROOT / "README.md").read_text(), re.S)
    script = tmp_path / "train.py"
    script.write_text(code)
    assert "2 stages x 2 replicas" in run([sys.executable, str(script)], tmp_path)
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


@pytest.mark.timeout(150)
def test_the_command_of_the_readme_trains(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "lightning-sentinel"), "fit"]
    command += ["--config", "examples/shakespeare/config.yaml", "--trainer.max_steps", "3", "--trainer.val_check_interval", "2"]
    # Elsewhere than in the working tree, and without the network.
    command += ["--data.source", "stdlib", "--data.data_dir", str(tmp_path / "data")]
    command += ["--trainer.logger.save_dir", str(tmp_path / "runs"), "--trainer.enable_progress_bar", "false"]
    assert "2 stages x 2 replicas" in run(command, world.ROOT)
    metrics = next((tmp_path / "runs").glob("shakespeare/version_0/metrics.csv")).read_text()
    assert "val_bits_per_byte" in metrics
