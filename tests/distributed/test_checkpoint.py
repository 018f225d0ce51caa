"""A run that is stopped and resumed is the run that was not stopped, with what it had learned and whom it had banned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from tests.distributed import tasks, world


@pytest.mark.parametrize("attacked", [False, True])
def test_a_resumed_run_equals_an_unbroken_one(attacked: bool, tmp_path: Path) -> None:
    for number, rank in enumerate(world.run(tasks.resume, 4, str(tmp_path), attacked)):
        whole, second = rank["whole"], rank["second"]
        assert second["step"] == whole["step"] == 24
        assert second["banned"] == whole["banned"]
        assert second["flags"] == whole["flags"]
        assert set(whole["banned"]) == ({ls.Worker(1, 1)} if attacked else set())
        assert whole["weights"].keys() == second["weights"].keys()
        if Mesh(2, 2).worker(number) in whole["banned"]:
            continue  # nobody brings its weights up to date until a checkpoint is loaded
        for kind in ("weights", "verifiers"):
            for name, value in whole[kind].items():
                torch.testing.assert_close(second[kind][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
