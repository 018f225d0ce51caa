from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models import GPTBlock, TokenEmbedding, gpt, gpt_layers

VOCABULARY, WIDTH, DEPTH, HEADS, LENGTH = 50, 24, 3, 2, 16


def make(seed: int = 0, **overrides: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return gpt(**{"vocab_size": VOCABULARY, "width": WIDTH, "depth": DEPTH, "heads": HEADS, "max_length": LENGTH, **overrides})


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def test_layers_are_embedding_blocks_norm_head() -> None:
    layers = gpt_layers(VOCABULARY, WIDTH, DEPTH, HEADS)
    assert [type(layer) for layer in layers] == [TokenEmbedding, *[GPTBlock] * DEPTH, nn.LayerNorm, nn.Linear]


def test_one_tensor_travels_between_layers() -> None:
    x = tokens()
    for layer in list(make())[:-1]:
        x = layer(x)
        assert x.shape == (2, LENGTH, WIDTH)
    assert make()(tokens()).shape == (2, LENGTH, VOCABULARY)


def as_encoder_layer(block: GPTBlock) -> nn.TransformerEncoderLayer:
    """torch's own layer with the same weights."""
    theirs = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation=nn.GELU(approximate="tanh"), batch_first=True, norm_first=True
    )
    theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = block.qkv.weight.data, block.qkv.bias.data
    theirs.self_attn.out_proj, theirs.linear1, theirs.linear2 = block.attention_out, block.mlp_in, block.mlp_out  # type: ignore[assignment]
    theirs.norm1, theirs.norm2 = block.attention_norm, block.mlp_norm
    return theirs


def test_a_block_equals_the_transformer_layer_of_torch() -> None:
    torch.manual_seed(0)
    block, x = GPTBlock(WIDTH, HEADS, DEPTH), torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad():
        # Weights and biases far from their start, so that each of them counts.
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    torch.testing.assert_close(block(x), as_encoder_layer(block)(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", [1, 7, LENGTH - 1])
def test_a_later_token_never_changes_earlier_logits(position: int) -> None:
    model, before = make(), tokens()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    after = before.clone()
    after[:, position] = (after[:, position] + 1) % VOCABULARY
    difference = (model(after) - model(before)).abs().amax(dim=(0, 2))
    torch.testing.assert_close(difference[:position], torch.zeros(position), rtol=0, atol=1e-5)
    assert difference[position] > 1e-3


def test_the_same_token_differs_by_its_position() -> None:
    embedding = make()[0]
    x = embedding(torch.zeros(1, LENGTH, dtype=torch.long))[0]
    torch.testing.assert_close(x - x[0], embedding.position.weight - embedding.position.weight[0])


def test_parameter_count() -> None:
    block = 12 * WIDTH**2 + 13 * WIDTH
    expected = (2 * VOCABULARY + LENGTH) * WIDTH + DEPTH * block + 2 * WIDTH
    assert sum(p.numel() for p in make().parameters()) == expected


def test_every_parameter_receives_a_gradient() -> None:
    model = make()
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_initial_weights() -> None:
    model = make(width=128, depth=8)
    small = 0.02 / 16**0.5
    for weight, std in [
        (model[0].token.weight, 0.02),
        (model[0].position.weight, 0.02),
        (model[1].qkv.weight, 0.02),
        (model[1].attention_out.weight, small),
        (model[1].mlp_out.weight, small),
        (model[-1].weight, 0.02),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5}, "width=24 cannot be split into heads=5.*multiple of heads"),
        ({"heads": 0}, "heads=0"),
        ({"depth": 0}, "depth=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
    ],
)
def test_bad_sizes(overrides: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**overrides)


def test_a_sequence_beyond_max_length() -> None:
    with pytest.raises(ConfigurationError, match=r"17 tokens.*max_length=16.*max_length=17"):
        make()(tokens(length=LENGTH + 1))
