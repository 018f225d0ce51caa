"""In from a folder, out to a folder; transformers itself reads and writes the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models import causal_lm_layers, save_pretrained
from lightning_sentinel.models.huggingface.configs import config_of
from lightning_sentinel.models.huggingface.reading import weight_files
from tests.models.families import CONFIGS, tokens, unsplit

EVERY = pytest.mark.parametrize("family", CONFIGS)
SHARD = "20KB"


def from_pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def pretrained(folder: Path, family: str, shard: str = SHARD, **others: Any) -> Any:
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
    assert set(weight_files(tmp_path / "out")) - {"lm_head.weight"} == set(weight_files(tmp_path / "in")) - {"lm_head.weight"}


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


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_tied_folder_is_untied(family: str, tmp_path: Path) -> None:
    whole = pretrained(tmp_path / "in", family, tie_word_embeddings=True)
    assert "lm_head.weight" not in weight_files(tmp_path / "in")
    model = causal_lm_layers(tmp_path / "in").eval()
    assert torch.equal(model(tokens()), whole(tokens()).logits)
    with torch.no_grad():
        model[-1].head.weight.mul_(2)
    assert torch.equal(model[-1].head.weight, 2 * model[0].tokens.weight), "they are two now"
    save_pretrained(model, tmp_path / "out")
    exported = from_pretrained(tmp_path / "out")
    assert not exported.config.tie_word_embeddings
    assert torch.equal(exported(tokens()).logits, model(tokens()))


def test_a_folder_can_be_written_over(tmp_path: Path) -> None:
    pretrained(tmp_path, "llama", shard="5GB")
    model = causal_lm_layers(tmp_path).eval()
    before = model(tokens())
    save_pretrained(model, tmp_path)
    assert torch.equal(model(tokens()), before)
    assert torch.equal(from_pretrained(tmp_path)(tokens()).logits, before)


class TestOnlySomeLayers:
    @EVERY
    @pytest.mark.parametrize("wanted", [[0], [1, 2], [3], [4, 5]], ids=str)
    def test_other_tensors_are_not_read(
        self, family: str, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = pretrained(tmp_path, family, shard="5GB")
        read: list[str] = []
        real = safetensors.safe_open

        class Recording:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.file = real(*args, **kwargs)

            def __enter__(self) -> Recording:
                self.file.__enter__()
                return self

            def __exit__(self, *args: Any) -> None:
                self.file.__exit__(*args)

            def keys(self) -> Any:
                return self.file.keys()

            def get_slice(self, key: str) -> Any:
                read.append(key)
                return self.file.get_slice(key)

        monkeypatch.setattr(safetensors, "safe_open", Recording)
        model = causal_lm_layers(tmp_path, only=wanted)
        original = whole.state_dict()
        for index, layer in enumerate(model):
            for key, value in layer.original_state().items():
                assert value.is_meta == (index not in wanted), key
                assert value.is_meta or torch.equal(value, original[key]), key
        layers = {key.split(".")[2] for key in read if ".layers." in key or ".h." in key}
        assert layers == {str(index - 1) for index in wanted if 1 <= index <= 3}
        # A tied head is read from the embedding.
        assert any("embed_tokens" in key or "wte" in key for key in read) == (0 in wanted or (family == "gpt2" and 5 in wanted))
        assert len(read) == len(set(read))

    def test_other_files_are_not_opened(self, tmp_path: Path) -> None:
        whole = pretrained(tmp_path, "mixtral")
        files = weight_files(tmp_path)
        wanted = {files[key] for key in files if key.startswith("model.layers.1.")}
        others = set(files.values()) - wanted
        assert others
        for file in others:
            file.write_bytes(b"not a tensor")
        (layer,) = [layer for layer in causal_lm_layers(tmp_path, only=[2]) if not next(layer.parameters()).is_meta]
        for key, value in layer.original_state().items():
            assert torch.equal(value, whole.state_dict()[key])
        with pytest.raises(ConfigurationError, match=r"\.safetensors cannot be read as safetensors .*Copy the file again"):
            causal_lm_layers(tmp_path)

    def test_layers_read_apart_make_the_whole(self, tmp_path: Path) -> None:
        pretrained(tmp_path, "deepseek_v3")
        first, second = causal_lm_layers(tmp_path, only=range(3)), causal_lm_layers(tmp_path, only=range(3, 6))
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
        assert causal_lm_layers(tmp_path, only=[0, 1, 3]) is not None

    def test_with_other_sizes(self, tmp_path: Path) -> None:
        pretrained(tmp_path, "llama")
        with pytest.raises(ConfigurationError, match=r"mismatched: .*overrides change the size"):
            causal_lm_layers(tmp_path, {"intermediate_size": 56})


class TestExports:
    def test_a_stage_cannot_be_exported(self, tmp_path: Path) -> None:
        model = causal_lm_layers({"model_type": "llama", **CONFIGS["llama"]})
        model[1] = nn.Identity()
        with pytest.raises(ConfigurationError, match=r"has 5 layers of a language model of 6.*load_from_checkpoint"):
            save_pretrained(model, tmp_path)

    def test_something_else_cannot_be_exported(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"Linear has 0 layers of a language model, so"):
            save_pretrained(nn.Linear(2, 2), tmp_path)

    def test_the_dtype_is_that_of_the_weights(self, tmp_path: Path) -> None:
        model = causal_lm_layers({"model_type": "llama", **CONFIGS["llama"]}).bfloat16()
        save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        assert from_pretrained(tmp_path).dtype == torch.bfloat16
