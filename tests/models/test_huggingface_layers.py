"""The split model is transformers' own, bit for bit."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sentinel.errors import ConfigurationError, MissingExtraError
from lightning_sentinel.models import causal_lm_layers, tokens_and_mask
from lightning_sentinel.models.huggingface import FAMILIES
from lightning_sentinel.models.huggingface.channels import attended, beside, join, split
from tests.models.families import CONFIGS, LENGTH, MIXTURES, VOCABULARY, config, padded, tokens, unsplit

EVERY = pytest.mark.parametrize("family", CONFIGS)


def split_model(family: str, seed: int = 0, **others: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return causal_lm_layers(config(family, **others))


def logits(model: nn.Module, *inputs: Tensor, **named: Tensor) -> Tensor:
    with torch.no_grad():
        result = model.eval()(*inputs, **named)
    return result if isinstance(result, Tensor) else result.logits


def test_every_family_of_the_table_is_tested() -> None:
    assert list(CONFIGS) == list(FAMILIES)
    assert set(MIXTURES) == {name for name, family in FAMILIES.items() if family.router_loss}


@EVERY
def test_logits_equal_the_unsplit_models(family: str) -> None:
    assert torch.equal(logits(split_model(family), tokens()), logits(unsplit(family), tokens()))


@EVERY
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_logits_equal_the_unsplit_models_with_padding(family: str, side: str) -> None:
    input_ids, mask = padded(side)
    whole = logits(unsplit(family), input_ids, attention_mask=mask)
    assert torch.equal(logits(split_model(family), tokens_and_mask(input_ids, mask)), whole)
    if side != "right":
        assert not torch.equal(logits(split_model(family), input_ids)[mask == 1], whole[mask == 1])


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in (*MIXTURES, "deepseek_v3")])
def test_padding_on_the_right_needs_no_mask(family: str) -> None:
    input_ids, mask = padded("right")
    model = split_model(family)
    with_mask, without = logits(model, tokens_and_mask(input_ids, mask)), logits(model, input_ids)
    # Another kernel: only nearly equal.
    torch.testing.assert_close(without[mask == 1], with_mask[mask == 1])


@EVERY
def test_logits_equal_the_unsplit_models_in_bfloat16(family: str) -> None:
    input_ids, mask = padded("both")
    model = split_model(family, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    whole = logits(unsplit(family, dtype="bfloat16"), input_ids, attention_mask=mask)
    assert torch.equal(logits(model, tokens_and_mask(input_ids, mask)), whole)


@EVERY
def test_logits_equal_the_unsplit_models_with_eager_attention(family: str) -> None:
    input_ids, mask = padded("left")
    torch.manual_seed(0)
    model = causal_lm_layers({"model_type": family, **CONFIGS[family]}, {"attn_implementation": "eager"})
    assert model[1].config._attn_implementation == "eager"
    whole = logits(unsplit(family, attn_implementation="eager"), input_ids, attention_mask=mask)
    assert torch.equal(logits(model, tokens_and_mask(input_ids, mask)), whole)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_stretched_positions_are_those_of_the_unsplit_model(rope: dict[str, Any]) -> None:
    stretched = {"rope_parameters": {"rope_theta": 10000.0, **rope}, "max_position_embeddings": 8}
    whole, model = unsplit("llama", **stretched), split_model("llama", **stretched)
    assert not torch.equal(logits(model, tokens()), logits(split_model("llama"), tokens()))
    for length in (12, 20, 6):
        assert torch.equal(logits(model, tokens(length=length)), logits(whole, tokens(length=length))), length


@EVERY
def test_gradients_equal_the_unsplit_models(family: str) -> None:
    input_ids, mask = padded("both")
    whole, model = unsplit(family), split_model(family)
    whole.eval()(input_ids, attention_mask=mask).logits.square().mean().backward()
    model.eval()(tokens_and_mask(input_ids, mask)).square().mean().backward()
    expected = {name: p.grad for name, p in whole.named_parameters(remove_duplicate=False)}
    found = {
        f"{path}.{name}": p.grad
        for layer in model
        for part, path in layer.parts.items()
        for name, p in getattr(layer, part).named_parameters()
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@EVERY
def test_one_tensor_of_one_width_travels(family: str) -> None:
    x, widths = tokens_and_mask(*padded("left")), set()
    for layer in list(split_model(family))[:-1]:
        x = layer(x)
        assert isinstance(x, Tensor) and x.is_floating_point() and x.shape[:2] == (3, LENGTH)
        widths.add(x.shape[-1])
    assert widths == {33}


def test_windows_are_those_of_the_unsplit_model() -> None:
    windowed = {name: [layer.windowed for layer in split_model(name)[1:-2]] for name in CONFIGS}
    assert windowed["mistral"] == windowed["mixtral"] == [True] * 3
    assert windowed["qwen2"] == windowed["qwen3"] == [False, True, True]
    assert windowed["llama"] == windowed["gpt2"] == windowed["qwen3_moe"] == [False] * 3


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_tied_head_shares_the_embedding(family: str) -> None:
    given = config(family, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = causal_lm_layers(given)
    assert model[-1].head.weight is model[0].tokens.weight
    assert torch.equal(logits(model, tokens()), logits(unsplit(family, tie_word_embeddings=True), tokens()))
    untied = causal_lm_layers(given, {"tie_word_embeddings": False})
    assert untied[-1].head.weight is not untied[0].tokens.weight
    assert given.tie_word_embeddings, "the user's config is left alone"


def test_dropout_is_that_of_the_unsplit_model() -> None:
    model, whole = split_model("gpt2"), unsplit("gpt2")
    drawn = []
    for each in (model, whole):
        torch.manual_seed(5)
        result = each.train()(tokens())
        drawn.append(result if isinstance(result, Tensor) else result.logits)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], logits(model, tokens()))


def test_a_model_can_be_copied() -> None:
    model = split_model("mixtral")
    assert torch.equal(logits(copy.deepcopy(model), tokens()), logits(model, tokens()))


def test_learned_positions_end() -> None:
    with pytest.raises(ConfigurationError, match=r"65 tokens.*max_position_embeddings=64"):
        split_model("gpt2")(tokens(length=65))


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(ConfigurationError, match=r"attention_mask has shape \(3, 11\) and input_ids \(3, 12\)"):
        tokens_and_mask(tokens(), torch.ones(3, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_rides_along_exactly(dtype: torch.dtype) -> None:
    hidden, mask = torch.randn(3, LENGTH, 8, dtype=dtype), padded("both")[1]
    again, side = split(join(hidden, beside(hidden, mask, experts=2)), 8)
    assert torch.equal(again, hidden) and again.is_contiguous()
    assert torch.equal(attended(side), mask.bool())
    assert side.shape[-1] == 5 and not side[..., 1:].any()
    unpadded = beside(hidden, None, experts=0)[..., 0].float()
    assert attended(unpadded.unsqueeze(-1)).all()
    assert min(unpadded.std(), side[..., 0].float().std()) > 0.5, "it varies with and without padding"


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "bert"])
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigurationError, match=f"model_type='{family}' cannot be cut.*deepseek_v3, gpt2, llama, mistral"):
        causal_lm_layers({"model_type": family})


def test_quantised_weights_are_refused() -> None:
    quantised = config("llama", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigurationError, match=r"This Llama has quantised weights"):
        causal_lm_layers(quantised)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ({"hidden_size": 8}, None, "model_type=None is none that transformers knows"),
        (CONFIGS["llama"] | {"model_type": "llama"}, {"width": 8, "vocab_size": 9}, r"overrides=\['width'\] name nothing"),
        (3, None, "A int is no model"),
        ("meta-llama/Llama-3.1-8B", None, r"'meta-llama/Llama-3.1-8B' is no folder on this machine.*hf download"),
    ],
)
def test_what_is_no_model(source: Any, overrides: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        causal_lm_layers(source, overrides)


def test_overrides_replace_what_a_config_says() -> None:
    given = config("llama")
    model = causal_lm_layers(given, {"vocab_size": 71, "num_hidden_layers": 1})
    assert model(tokens()).shape == (3, LENGTH, 71)
    assert len(model) == 4
    assert (given.vocab_size, given.num_hidden_layers) == (VOCABULARY, 3)


def test_without_the_extra_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"'transformers', which is not installed.*pip install 'lightning-sentinel\[hf\]'"):
        causal_lm_layers({"model_type": "llama"})
