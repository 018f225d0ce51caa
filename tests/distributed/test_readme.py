"""The commands and the module of the README, as they stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.distributed import starting, world


def run(command: list[str], directory: Path, said: Path) -> str:
    process = starting.start(command, starting.clean_environment() | {"COLUMNS": "120"}, directory, said)
    try:
        code = starting.wait(process, 110)
    finally:
        starting.stop(process)
    assert code == 0, said.read_text()
    return said.read_text()


def test_the_module_of_the_readme_trains(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(import lightning as L\nimport torch\n.*?)```", (world.ROOT / "README.md").read_text(), re.S)
    script = tmp_path / "train.py"
    script.write_text(code)
    assert "2 stages x 2 replicas" in run([str(script)], tmp_path, tmp_path / "said")
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


@pytest.mark.timeout(150)
def test_the_command_of_the_readme_trains(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "lightning-sentinel"), "fit"]
    command += ["--config", "examples/shakespeare/config.yaml", "--trainer.max_steps", "3", "--trainer.val_check_interval", "2"]
    # Elsewhere than in the working tree, and without the network.
    command += ["--data.source", "stdlib", "--data.data_dir", str(tmp_path / "data")]
    command += ["--trainer.logger.save_dir", str(tmp_path / "runs"), "--trainer.enable_progress_bar", "false"]
    assert "2 stages x 2 replicas" in run(command, world.ROOT, tmp_path / "said")
    metrics = next((tmp_path / "runs").glob("shakespeare/version_0/metrics.csv")).read_text()
    assert "val_bits_per_byte" in metrics
