"""Language models of transformers in a real pipeline: weights as in one process, and a folder at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sentinel.models import CausalLM, save_pretrained
from tests.distributed import language_tasks, world
from tests.models.families import tokens, unsplit

STAGES, REPLICAS = 2, 2


@pytest.mark.parametrize(("family", "overrides"), [("llama", {}), ("mixtral", language_tasks.ROUTED)])
def test_weights_equal_a_run_on_one_process_and_are_exported(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, checkpoint = str(tmp_path / "in"), str(tmp_path / "trained.ckpt")
    unsplit(family).save_pretrained(folder)
    ranks = world.run(language_tasks.fit, STAGES * REPLICAS, folder, overrides, STAGES, REPLICAS, checkpoint)
    alone = language_tasks.fit_alone(folder, overrides, REPLICAS)

    seen = set()
    for rank in ranks:
        assert "train_loss" in rank["metrics"] and ("train_router_loss" in rank["metrics"]) == bool(overrides)
        for name, value in rank["weights"].items():
            seen.add(name)
            assert (value - alone[name]).abs().max() <= 1e-6, name
    assert seen == set(alone)
    before = CausalLM(folder).state_dict()
    assert all((alone[name] - before[name]).abs().max() > 1e-4 for name in alone), "every weight was trained"

    trained = CausalLM.load_from_checkpoint(checkpoint).eval()
    save_pretrained(trained, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(exported(tokens()).logits, trained(tokens()))
