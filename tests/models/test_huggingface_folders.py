"""In from a folder, out to a folder; transformers itself reads and writes the other side."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models import causal_lm_layers, save_pretrained
from lightning_sentinel.models.huggingface.configs import config_of
from lightning_sentinel.models.huggingface.reading import weight_files
from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.materialise import materialise
from tests.models.families import CONFIGS, tokens, unsplit

EVERY = pytest.mark.parametrize("family", CONFIGS)
SHARD, EACH = "20KB", 1


def from_pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def pretrained(folder: Path, family: str, shard: str | int = SHARD, **others: Any) -> Any:
    model = unsplit(family, **others).eval()
    with torch.no_grad():
        # Also what is zero or one at the start, such as biases and norms, so that nothing can be missed.
        for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if "correction_bias" in name)):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@EVERY
@pytest.mark.parametrize("shard", [SHARD, "5GB"])
def test_a_folder_gives_the_model_that_transformers_reads(family: str, shard: str, tmp_path: Path) -> None:
    pretrained(tmp_path, family, shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == SHARD)
    model = causal_lm_layers(str(tmp_path)).eval()
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert torch.equal(model(tokens()), from_pretrained(tmp_path)(tokens()).logits)


@EVERY
def test_a_trained_model_goes_back_to_a_folder_of_the_same_kind(family: str, tmp_path: Path) -> None:
    pretrained(tmp_path / "in", family)
    model = causal_lm_layers(tmp_path / "in").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_pretrained(model, tmp_path / "out", max_shard_size=SHARD)
    assert torch.equal(from_pretrained(tmp_path / "out")(tokens()).logits, model(tokens()))
    assert torch.equal(causal_lm_layers(tmp_path / "out").eval()(tokens()), model(tokens()))
    # On the hub, experts have names of their own, whatever transformers makes of them.
    assert set(weight_files(tmp_path / "out")) == set(weight_files(tmp_path / "in"))


@EVERY
def test_half_precision_goes_in_and_out(family: str, tmp_path: Path) -> None:
    pretrained(tmp_path / "in", family, dtype="bfloat16")
    model = causal_lm_layers(tmp_path / "in").eval()
    whole = from_pretrained(tmp_path / "in")
    assert torch.equal(model(tokens()), whole(tokens()).logits)
    save_pretrained(model, tmp_path / "out")
    assert from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_folder_in_half_precision_can_be_trained_in_full(tmp_path: Path) -> None:
    pretrained(tmp_path, "llama", dtype="bfloat16")
    model = causal_lm_layers(tmp_path, {"dtype": "float32"})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


TIED = pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral"])


@TIED
def test_a_tied_folder_stays_tied(family: str, tmp_path: Path) -> None:
    whole = pretrained(tmp_path / "in", family, tie_word_embeddings=True)
    assert "lm_head.weight" not in weight_files(tmp_path / "in")
    model = causal_lm_layers(tmp_path / "in").eval()
    assert model[-1].head.weight is model[0].tokens.weight
    assert torch.equal(model(tokens()), whole(tokens()).logits)
    with torch.no_grad():
        model[-1].head.weight.mul_(2)
    save_pretrained(model, tmp_path / "out")
    assert set(weight_files(tmp_path / "out")) == set(weight_files(tmp_path / "in"))
    exported = from_pretrained(tmp_path / "out")
    assert exported.config.tie_word_embeddings
    assert torch.equal(exported(tokens()).logits, model(tokens()))


@TIED
def test_a_tied_folder_can_be_untied(family: str, tmp_path: Path) -> None:
    whole = pretrained(tmp_path / "in", family, tie_word_embeddings=True)
    model = causal_lm_layers(tmp_path / "in", {"tie_word_embeddings": False}).eval()
    assert torch.equal(model(tokens()), whole(tokens()).logits)
    with torch.no_grad():
        model[-1].head.weight.mul_(2)
    assert torch.equal(model[-1].head.weight, 2 * model[0].tokens.weight), "they are two now"
    save_pretrained(model, tmp_path / "out")
    exported = from_pretrained(tmp_path / "out")
    assert not exported.config.tie_word_embeddings
    assert torch.equal(exported(tokens()).logits, model(tokens()))


def say_that_it_is_tied(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("shard", [SHARD, "5GB"])
@pytest.mark.parametrize("equal", [True, False])
def test_what_decides_a_tie_that_a_config_claims_are_the_weights(equal: bool, shard: str, tmp_path: Path) -> None:
    whole = unsplit("llama").eval()
    if equal:
        with torch.no_grad():
            whole.lm_head.weight.copy_(whole.model.embed_tokens.weight)
    whole.save_pretrained(tmp_path, max_shard_size=shard)
    say_that_it_is_tied(tmp_path)
    with contextlib.nullcontext() if equal else pytest.warns(UserWarning, match="has a head beside the embedding"):
        model = causal_lm_layers(tmp_path).eval()
    assert (model[-1].head.weight is model[0].tokens.weight) == model[0].config.tie_word_embeddings == equal
    assert torch.equal(model(tokens()), whole(tokens()).logits)
    assert torch.equal(model(tokens()), from_pretrained(tmp_path)(tokens()).logits)


def test_a_tied_folder_may_have_the_head_instead_of_the_embedding(tmp_path: Path) -> None:
    whole = unsplit("llama").eval()
    whole.save_pretrained(tmp_path, state_dict={k: v for k, v in whole.state_dict().items() if "embed_tokens" not in k})
    say_that_it_is_tied(tmp_path)
    assert torch.equal(causal_lm_layers(tmp_path).eval()(tokens()), from_pretrained(tmp_path)(tokens()).logits)


def test_a_folder_can_be_written_over(tmp_path: Path) -> None:
    pretrained(tmp_path, "llama", shard="5GB")
    model = causal_lm_layers(tmp_path).eval()
    before = model(tokens())
    save_pretrained(model, tmp_path)
    assert torch.equal(model(tokens()), before)
    assert torch.equal(from_pretrained(tmp_path)(tokens()).logits, before)


def stage_of(source: Any, wanted: Collection[int]) -> tuple[nn.Sequential, DeferredBuild]:
    """What a process has that keeps some layers, before they have values."""
    build = DeferredBuild()
    with build:
        model = causal_lm_layers(source)
    for index in set(range(len(model))) - set(wanted):
        model[index] = nn.Identity()
    return model, build


def layer_of(key: str) -> int:
    """Which of the layers a tensor on the hub belongs to; all models here have three blocks."""
    if found := re.search(r"\.(?:layers|h)\.(\d+)\.", key):
        return int(found[1]) + 1
    return next(
        layer for part, layer in {"wte": 0, "wpe": 0, "embed": 0, "ln_f": 4, "norm": 4, "lm_head": 5}.items() if part in key
    )


class TestAStage:
    @EVERY
    @pytest.mark.parametrize("wanted", [[0], [1, 2], [3], [4, 5]], ids=str)
    def test_needs_no_files_but_its_own(self, family: str, wanted: list[int], tmp_path: Path) -> None:
        original = pretrained(tmp_path, family, shard=EACH).state_dict()
        files = weight_files(tmp_path)
        assert len({(file, layer_of(key)) for key, file in files.items()}) == len(set(files.values())), "of one layer each"
        own = {file for key, file in files.items() if layer_of(key) in wanted}
        if family == "gpt2" and 5 in wanted:
            own.add(files["transformer.wte.weight"])  # to which its head is tied
        others = set(files.values()) - own
        assert own and others
        for file in others:
            file.unlink()
        model, build = stage_of(tmp_path, wanted)
        materialise(model, build)
        for index in wanted:
            for key, value in model[index].original_state().items():
                assert torch.equal(value, original[key]), key
        with pytest.raises(ConfigurationError, match=r"\.safetensors cannot be read as safetensors .*Copy the file again"):
            causal_lm_layers(tmp_path)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
    def test_never_has_more_memory_than_it_and_a_tensor(self, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # torch counts memory in this thread
        sizes = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 128}
        pretrained(tmp_path, family, shard=EACH, **sizes)
        model, build = stage_of(tmp_path, [2])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            materialise(model, build)
        allocated = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = list(itertools.accumulate(allocated))
        weights = [tensor.nbytes for tensor in (*model.parameters(), *model.buffers())]
        assert live[-1] == sum(weights)
        assert max(live) <= sum(weights) + max(weights)

    @EVERY
    def test_draws_what_the_whole_would(self, family: str) -> None:
        torch.manual_seed(3)
        whole, then = causal_lm_layers(config_of({"model_type": family, **CONFIGS[family]})), torch.rand(2)
        for wanted in ([0, 1], [2, 3], [4, 5]):
            torch.manual_seed(3)
            model, build = stage_of(config_of({"model_type": family, **CONFIGS[family]}), wanted)
            assert torch.equal(torch.rand(2), then)
            materialise(model, build)
            for index in wanted:
                for key, value in model[index].state_dict().items():
                    assert torch.equal(value, whole[index].state_dict()[key]), key

    def test_makes_the_whole_with_the_others(self, tmp_path: Path) -> None:
        pretrained(tmp_path, "deepseek_v3")
        (first, one), (second, other) = stage_of(tmp_path, range(3)), stage_of(tmp_path, range(3, 6))
        materialise(first, one)
        materialise(second, other)
        model = nn.Sequential(*first[:3], *second[3:]).eval()
        assert torch.equal(model(tokens()), from_pretrained(tmp_path)(tokens()).logits)


def test_a_checkpoint_of_the_model_without_its_head_will_do(tmp_path: Path) -> None:
    """As the oldest GPT-2 checkpoints are: without a prefix, and with a head that is the embedding."""
    whole = pretrained(tmp_path / "whole", "gpt2")
    whole.transformer.save_pretrained(tmp_path / "base")
    assert not any(key.startswith("transformer.") for key in weight_files(tmp_path / "base"))
    assert torch.equal(causal_lm_layers(tmp_path / "base").eval()(tokens()), whole(tokens()).logits)


class TestFoldersThatWillNotDo:
    def test_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"has no config.json"):
            causal_lm_layers(tmp_path)

    def test_without_safetensors(self, tmp_path: Path) -> None:
        config_of({"model_type": "llama", **CONFIGS["llama"]}).save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match=r"neither model.safetensors nor .*save_pretrained"):
            causal_lm_layers(tmp_path)

    def test_with_a_tensor_missing(self, tmp_path: Path) -> None:
        pretrained(tmp_path, "llama")
        index = tmp_path / "model.safetensors.index.json"
        listed = json.loads(index.read_text())
        del listed["weight_map"]["model.layers.1.mlp.up_proj.weight"]
        index.write_text(json.dumps(listed))
        with pytest.raises(ConfigurationError, match=r"missing: \['model.layers.1.mlp.up_proj.weight'\].*all files were copied"):
            causal_lm_layers(tmp_path)

    def test_with_other_sizes(self, tmp_path: Path) -> None:
        pretrained(tmp_path, "llama")
        with pytest.raises(ConfigurationError, match=r"mismatched: .*overrides change the size"):
            causal_lm_layers(tmp_path, {"intermediate_size": 56})


class TestExports:
    def test_a_stage_cannot_be_exported(self, tmp_path: Path) -> None:
        model = causal_lm_layers({"model_type": "llama", **CONFIGS["llama"]})
        model[1] = nn.Identity()
        with pytest.raises(ConfigurationError, match=r"has 5 layers of a language model of 6.*save a checkpoint"):
            save_pretrained(model, tmp_path)

    def test_something_else_cannot_be_exported(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"Linear has 0 layers of a language model, so"):
            save_pretrained(nn.Linear(2, 2), tmp_path)

    def test_a_checkpoint_in_parts_is_made_one_file_first(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"is a directory.*lightning-sentinel consolidate"):
            save_pretrained(tmp_path, tmp_path / "out")

    def test_a_checkpoint_of_something_else_cannot_be_exported(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"gone.ckpt' cannot be read as a checkpoint of CausalLM \(FileNotFound"):
            save_pretrained(tmp_path / "gone.ckpt", tmp_path / "out")
        torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "other.ckpt")
        with pytest.raises(ConfigurationError, match=r"\(KeyError: 'source'\)\. Name a file that a Trainer saved of one"):
            save_pretrained(tmp_path / "other.ckpt", tmp_path / "out")

    def test_the_dtype_is_that_of_the_weights(self, tmp_path: Path) -> None:
        model = causal_lm_layers({"model_type": "llama", **CONFIGS["llama"]}).bfloat16()
        save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        assert from_pretrained(tmp_path).dtype == torch.bfloat16
