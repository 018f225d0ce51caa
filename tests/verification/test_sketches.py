from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sentinel.verification.sketches import SKETCHED, GradientSketch, sketch_error
from tests.verification.test_no_readback import no_readback

SHAPES = [(32, 16), (7,), (), (4, 3, 5, 5), (6, 8, 10)]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_sketches_are_linear() -> None:
    one, other, sketch = gradients(0), gradients(1), GradientSketch(seed=5)
    both = sketch([2 * a - b for a, b in zip(one, other)])
    torch.testing.assert_close(both, 2 * sketch(one) - sketch(other), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sketch([None, *one[1:]]) + sketch([one[0], *[None] * 4]), sketch(one), rtol=1e-4, atol=1e-4)


def test_the_mean_square_over_seeds_is_that_of_the_gradient() -> None:
    given = gradients(0)
    expected = sum(float(one.square().sum()) for one in given)
    squares = [float(GradientSketch(seed)(given).square().sum()) for seed in range(200)]
    assert sum(squares) / len(squares) == pytest.approx(expected, rel=0.05)


def test_inner_products_are_those_of_the_gradients() -> None:
    one, other = gradients(0), [a + 0.5 * b for a, b in zip(gradients(0), gradients(1))]
    expected = sum(float((a * b).sum()) for a, b in zip(one, other))
    found = [float(sketch(one) @ sketch(other)) for sketch in map(GradientSketch, range(200))]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.05)


def test_other_seeds_are_other_directions_and_the_same_seed_the_same() -> None:
    given = gradients(0)
    assert GradientSketch(1)(given).equal(GradientSketch(1)(given))
    assert float(torch.cosine_similarity(GradientSketch(1)(given), GradientSketch(2)(given), dim=0)) < 0.5


def test_half_precision_is_summed_in_single() -> None:
    given = [one.bfloat16() for one in gradients(0)]
    assert GradientSketch(1)(given).equal(GradientSketch(1)([one.float() for one in given]))


def test_no_readback_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    given, sketch = [one.requires_grad_() for one in gradients(0)], GradientSketch(1)
    sketch(given)
    with no_readback(monkeypatch):
        found = sketch(given)
    assert not found.requires_grad and found.shape == (SKETCHED,)


@pytest.mark.parametrize(
    ("claimed", "recomputed", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([-3.0, -4.0], [3.0, 4.0], 2.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-9, 0.0], [0.0, 0.0], torch.inf),
        ([torch.nan, 0.0], [1.0, 0.0], torch.inf),
        ([1.0, 0.0], [torch.inf, 0.0], torch.inf),
        ([torch.nan, 0.0], [torch.inf, 0.0], 0.0),
        ([3e38, 0.0], [-3e38, 0.0], 2.0),
    ],
)
def test_the_error_is_relative_to_what_was_recomputed(claimed: list[float], recomputed: list[float], error: float) -> None:
    assert float(sketch_error(torch.tensor(claimed), torch.tensor(recomputed))) == pytest.approx(error)
