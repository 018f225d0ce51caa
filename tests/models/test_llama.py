from __future__ import annotations

import cmath

import pytest
import torch
from torch import Tensor, nn

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models import Attention, Block, llama, llama_layers, rotary_tables, rotate

VOCABULARY, WIDTH, DEPTH, HEADS, LENGTH = 50, 24, 3, 2, 16


def make(seed: int = 0, **overrides: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "width": WIDTH, "depth": DEPTH, "heads": HEADS, "max_length": LENGTH}
    return llama(**{**sizes, **overrides})


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def test_layers_are_embedding_blocks_norm_head() -> None:
    layers = llama_layers(VOCABULARY, WIDTH, DEPTH, HEADS)
    assert [type(layer) for layer in layers] == [nn.Embedding, *[Block] * DEPTH, nn.RMSNorm, nn.Linear]
    assert layers[-1].bias is None


def test_one_tensor_travels_between_layers() -> None:
    x = tokens()
    for layer in list(make())[:-1]:
        x = layer(x)
        assert isinstance(x, Tensor)
        assert x.shape == (2, LENGTH, WIDTH)
    assert make()(tokens()).shape == (2, LENGTH, VOCABULARY)


@pytest.mark.parametrize("position", [1, 7, LENGTH - 1])
def test_a_later_token_never_changes_earlier_logits(position: int) -> None:
    model, before = make(), tokens()
    # Bigger weights than the initial ones, so that a leak would be far above the rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    after = before.clone()
    after[:, position] = (after[:, position] + 1) % VOCABULARY
    difference = (model(after) - model(before)).abs().amax(dim=(0, 2))
    torch.testing.assert_close(difference[:position], torch.zeros(position), rtol=0, atol=1e-5)
    assert (difference[position:] > 1e-3).all()


def test_rotation_is_a_complex_multiplication() -> None:
    head_dim = 6
    x = torch.randn(2, 3, LENGTH, head_dim, dtype=torch.float64)
    pairs = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :])
    for position in range(LENGTH):
        for pair in range(head_dim // 2):
            pairs[:, :, position, pair] *= cmath.rect(1.0, position / 10000 ** (2 * pair / head_dim))
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(rotate(x, *rotary_tables(LENGTH, head_dim)), expected, rtol=0, atol=1e-5)


def test_attention_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_tables(LENGTH, 8)
    query, key = torch.randn(2, 8)
    queries, keys = rotate(query.expand(LENGTH, 8), cos, sin), rotate(key.expand(LENGTH, 8), cos, sin)
    scores = queries @ keys.T
    for distance in range(-LENGTH + 1, LENGTH):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_attention_equals_the_textbook_loop() -> None:
    torch.manual_seed(0)
    attention, x = Attention(WIDTH, HEADS, LENGTH), torch.randn(2, 5, WIDTH)
    query, key, value = attention.qkv(x).split(WIDTH, dim=-1)
    head_dim = WIDTH // HEADS
    cos, sin = rotary_tables(5, head_dim)
    expected = torch.zeros(2, 5, WIDTH)
    for head in range(HEADS):
        channels = slice(head * head_dim, (head + 1) * head_dim)
        turned_query, turned_key = rotate(query[..., channels], cos, sin), rotate(key[..., channels], cos, sin)
        for t in range(5):
            scores = turned_key[:, : t + 1] @ turned_query[:, t, :, None] / head_dim**0.5
            expected[:, t, channels] = (scores.softmax(dim=1) * value[:, : t + 1, channels]).sum(dim=1)
    torch.testing.assert_close(attention(x), attention.out(expected))


def test_the_same_seed_makes_the_same_model_and_the_same_logits() -> None:
    first, second, other = make(), make(), make(seed=1)
    assert torch.equal(first(tokens()), second(tokens()))
    assert torch.equal(first(tokens()), first(tokens()))
    assert not torch.equal(first(tokens()), other(tokens()))


@pytest.mark.parametrize(("width", "hidden"), [(24, 64), (32, 88), (128, 344)])
def test_parameter_count(width: int, hidden: int) -> None:
    model = make(width=width)
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    assert sum(p.numel() for p in model.parameters()) == 2 * VOCABULARY * width + DEPTH * block + width


def test_initial_weights() -> None:
    model = make(width=128, depth=8)
    block = model[1]
    small = 0.02 / 16**0.5
    for weight, std in [
        (model[0].weight, 0.02),
        (block.attention.qkv.weight, 0.02),
        (block.attention.out.weight, small),
        (block.mlp.gate.weight, 0.02),
        (block.mlp.up.weight, 0.02),
        (block.mlp.down.weight, small),
        (model[-1].weight, 0.02),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_rotary_tables_stay_out_of_checkpoints() -> None:
    assert not [name for name in make().state_dict() if "cos" in name or "sin" in name]


def test_every_parameter_receives_a_gradient() -> None:
    model = make()
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bfloat16_stays_bfloat16() -> None:
    logits = make().bfloat16()(tokens())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5}, "width=24 cannot be split into heads=5.*multiple of heads"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 8}, "heads of 3 channels.*multiple of 16"),
        ({"depth": 0}, "depth=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"width": -2}, "width=-2"),
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
