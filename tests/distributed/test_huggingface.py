"""Language models of transformers in a real pipeline: weights as in one process, and a folder at the end."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sentinel.models import CausalLM, save_pretrained
from lightning_sentinel.models.huggingface.reading import weight_files
from lightning_sentinel.pipeline.checkpoints.sharded import consolidate
from tests.distributed import language_tasks, world
from tests.models.families import CONFIGS, tokens, unsplit

STAGES, REPLICAS, BLOCKS = 2, 2, 3
WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def stage_of(key: str, tied: bool) -> set[int]:
    """The first stage has the embedding and two blocks, the second one a block, the norm and the head."""
    if block := re.search(r"\.(?:layers|h)\.(\d+)\.", key):
        return {int(block[1]) // 2}
    if "wte" in key or "embed_tokens" in key:
        return {0, 1} if tied else {0}
    return {0} if "wpe" in key else {1}


def own_folders(folder: Path, stages: Path, tied: bool) -> None:
    """For each stage a copy of a folder without the weights of the others."""
    for stage in range(STAGES):
        shutil.copytree(folder, stages / str(stage))
        files = weight_files(stages / str(stage))
        for file in set(files.values()) - {file for key, file in files.items() if stage in stage_of(key, tied)}:
            file.unlink()


@pytest.mark.parametrize(
    ("family", "others", "overrides", "saved"),
    [
        ("llama", {}, {}, "full"),
        ("qwen2", {"tie_word_embeddings": True}, {}, "sharded"),
        ("gpt2", WITHOUT_DROPOUT, {}, "full"),
        ("mixtral", {}, language_tasks.ROUTED, "full"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_equal_those_of_transformers_and_are_exported(
    family: str, others: dict[str, Any], overrides: dict[str, Any], saved: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    whole = unsplit(family, **others)
    whole.save_pretrained(tmp_path / "in", max_shard_size=1)
    own_folders(tmp_path / "in", tmp_path / "stages", whole.config.tie_word_embeddings)
    assert all(len(list((tmp_path / "stages" / stage).glob("*.safetensors"))) > 3 for stage in "01")
    ranks = world.run(
        language_tasks.fit,
        STAGES * REPLICAS,
        str(tmp_path / "stages"),
        overrides,
        STAGES,
        REPLICAS,
        str(tmp_path),
        saved,
        timeout=110,
    )
    alone = language_tasks.fit_unsplit(str(tmp_path / "in"), overrides, REPLICAS)
    assert all((value - alone["before"][name]).abs().max() > 1e-4 for name, value in alone["weights"].items()), "all were trained"
    assert_equal(ranks, alone, bool(overrides))

    checkpoint = tmp_path / "last.ckpt"
    if saved == "sharded":
        consolidate(checkpoint, tmp_path / "whole.ckpt")
        checkpoint = tmp_path / "whole.ckpt"
    save_pretrained(checkpoint, tmp_path / "out")
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert exported.config.tie_word_embeddings == whole.config.tie_word_embeddings
    assert set(weight_files(tmp_path / "out")) == set(weight_files(tmp_path / "in"))
    for name, value in exported.state_dict().items():
        assert (value - alone["weights"][name]).abs().max() <= 1e-6, name
    trained = CausalLM.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(exported.eval()(tokens()).logits, trained(tokens()))


def test_a_config_gives_the_weights_that_transformers_draws(tmp_path: Path) -> None:
    source = {"model_type": "qwen3", **CONFIGS["qwen3"], "tie_word_embeddings": True}
    ranks = world.run(language_tasks.fit, STAGES * REPLICAS, source, {}, STAGES, REPLICAS, str(tmp_path), "full", timeout=110)
    assert_equal(ranks, language_tasks.fit_unsplit(source, {}, REPLICAS), routed=False)


def assert_equal(ranks: list[dict[str, Any]], alone: dict[str, Any], routed: bool) -> None:
    seen = set()
    for rank in ranks:
        assert rank["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-5)
        assert "train_loss" in rank["metrics"] and ("train_router_loss" in rank["metrics"]) == routed
        assert len(rank["weights"]) < len(alone["weights"])
        for name, value in rank["weights"].items():
            seen.add(name)
            assert (value - alone["weights"][name]).abs().max() <= 1e-6, name
    assert seen == set(alone["weights"])


def without_transformers() -> str:
    """The name of a class that is imported anew, as where transformers is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("lightning_sentinel", "transformers")]:
        del sys.modules[name]
    sys.modules["transformers"] = None  # type: ignore[assignment]
    from lightning_sentinel import models

    return str(models.CausalLM.__name__)


def test_importing_the_models_needs_no_transformers() -> None:
    assert world.run(without_transformers, 1) == ["CausalLM"]
