from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification.axes import as_tokens, batch_means
from lightning_sentinel.verification.consistency import consistency_features, paired
from lightning_sentinel.verification.distances import mean_absolute_difference, sign_flip_ratio, signs
from lightning_sentinel.verification.features import FAMILIES, FEATURES
from lightning_sentinel.verification.measurement import Measurement, measure, measure_published
from lightning_sentinel.verification.moments import moment_features, moment_statistics
from lightning_sentinel.verification.projection import SecretDirections
from lightning_sentinel.verification.references import Contribution, References
from lightning_sentinel.verification.temporal import Anchor, temporal_features

SENDERS = 3
SHAPES = [(4, 8), (4, 6, 8), (4, 40, 3, 2)]
SECRET = SecretDirections(Boundary(1, Direction.ACTIVATION), Verification())


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SENDERS * shape[0], *shape[1:], generator=torch.Generator().manual_seed(seed)).add(0.5).to(dtype)


def pair(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Signals, and what their senders had received."""
    received = draw(shape, seed, dtype)
    return (received.float() + 0.1 * draw(shape, seed + 1000)).to(dtype), received


def take_in(references: References, measured: Measurement) -> None:
    step, everyone = Contribution.like(measured.means, measured.statistics), torch.ones(SENDERS, dtype=torch.bool)
    step.add(measured.means, measured.statistics, everyone.float())
    references.update(step.of(everyone), measured.sizes)


def learned(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, with_input: bool = True) -> References:
    references = References(0.8)
    for seed in range(4):
        signals, received = pair(shape, seed, dtype)
        take_in(references, measure(signals, SENDERS, SECRET.project(received) if with_input else None, references, SECRET))
    return references


def columns(measured: Measurement, family: str) -> Tensor:
    return measured.features[:, [FEATURES.index(name) for name in FAMILIES[family]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_family_is_where_its_names_say(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    references = learned(shape, dtype)
    signals, received = pair(shape, 50, dtype)
    measured = measure(signals, SENDERS, SECRET.project(received), references, SECRET)
    assert (measured.features.shape, measured.features.dtype) == ((SENDERS, len(FEATURES)), torch.float32)
    assert measured.features.isfinite().all() and (measured.features != 0).any(dim=0).all()
    torch.testing.assert_close(measured.means, batch_means(signals, SENDERS))

    momentum = references.momentum.value
    sent, its = (SECRET.project(part).values.unflatten(0, (SENDERS, -1)) for part in (signals, received))
    tokens, flat = as_tokens(signals.float()).reshape(SENDERS, -1, momentum.shape[1]), sent.flatten(1, 2)
    statistics = moment_statistics(tokens.square().mean(dim=1), tokens.mean(dim=1), flat)
    moments, largest = moment_features(flat.norm(dim=-1), statistics, references.statistics)
    input_output, worst = consistency_features(paired(sent, its, same_channels=True), references.weights)
    expected = {
        "temporal": temporal_features(measured.means, Anchor.of(momentum, SECRET.slices(momentum.shape[1]))),
        "moments": moments,
        "input_output": input_output,
        "extremes": torch.cat((largest, worst), dim=1),
    }
    for family, values in expected.items():
        torch.testing.assert_close(columns(measured, family), values, rtol=1e-4, atol=1e-4, msg=family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_senders_at_once_are_measured_as_each_by_itself_in_any_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    references = learned(shape, dtype)
    signals, received = pair(shape, 51, dtype)
    together = measure(signals, SENDERS, SECRET.project(received), references, SECRET)
    mine, its = signals.chunk(SENDERS), received.chunk(SENDERS)
    apart = [measure(m, 1, SECRET.project(i), references, SECRET) for m, i in zip(mine, its)]
    order = [2, 0, 1]
    stacked = torch.cat([mine[i] for i in order]), torch.cat([its[i] for i in order])
    shuffled = measure(stacked[0], SENDERS, SECRET.project(stacked[1]), references, SECRET)
    for sender in range(SENDERS):
        place = order.index(sender)
        for one, index in ((apart[sender], 0), (shuffled, place)):
            torch.testing.assert_close(together.means[sender], one.means[index], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(together.features[sender], one.features[index], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(together.statistics[sender], one.statistics[index], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_one_sender_sends_does_not_reach_the_features_of_another(value: float) -> None:
    references = learned((4, 6, 8))
    signals, received = pair((4, 6, 8), 52)
    broken, broken_input = signals.clone(), received.clone()
    broken[5, 2, 3], broken_input[6, 1, 1] = value, value
    one, other = (
        measure(s, SENDERS, SECRET.project(r), references, SECRET) for s, r in ((signals, received), (broken, broken_input))
    )
    torch.testing.assert_close(one.features[[0, 2]], other.features[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one.features[1], other.features[1])


def test_at_the_ends_of_the_pipeline_there_is_nothing_to_compare_with() -> None:
    references = learned((4, 6, 8), with_input=False)
    measured = measure(draw((4, 6, 8), 53), SENDERS, None, references, SECRET)
    zero = [*FAMILIES["input_output"], "lowest_cosine", "peak_residual"]
    assert [name for name, column in zip(FEATURES, measured.features.T) if not column.any()] == zero
    assert references.weights is None


def test_without_references_features_are_zero_and_there_is_something_to_learn() -> None:
    signals, received = pair((4, 6, 8), 54)
    measured = measure(signals, SENDERS, SECRET.project(received), References(0.9), SECRET)
    assert not measured.features.any() and measured.means.any()
    assert measured.sizes == {"log_spread": 8, "gram": 64, "quantiles": 28, "input_input": 9 * 9, "input_target": 9 * 8}
    assert measured.statistics.shape == (SENDERS, sum(measured.sizes.values()))


@pytest.mark.parametrize(("shape", "of_input"), [((4, 6, 8), (4, 3, 8)), ((4, 6, 8), (4, 6, 20)), ((4, 8), (4, 20, 3, 2))], ids=str)
def test_what_was_received_may_have_another_shape(shape: tuple[int, ...], of_input: tuple[int, ...]) -> None:
    references = References(0.8)
    for seed in range(3):
        measured = measure(draw(shape, seed), SENDERS, SECRET.project(draw(of_input, seed + 100)), references, SECRET)
        take_in(references, measured)
    assert measured.features.isfinite().all()
    # There is a gain and a residual whatever the shape; a cosine and a change where the channels are the same.
    used = [True if of_input == (4, 3, 8) else name in ("gain", "residual") for name in FAMILIES["input_output"]]
    assert (columns(measured, "input_output") != 0).tolist() == [used] * SENDERS


def test_the_published_distances_are_on_their_own_scale() -> None:
    references = learned((4, 6, 8))
    signals = draw((4, 6, 8), 55)
    measured = measure_published(signals, SENDERS, references, SECRET)
    momentum = references.momentum.value
    np.testing.assert_allclose(measured.features[:, 0], mean_absolute_difference(measured.means, momentum), rtol=1e-5)
    np.testing.assert_allclose(measured.features[:, 2], sign_flip_ratio(measured.means, signs(momentum)), rtol=1e-5)
    assert not measured.features[:, 4:].any() and measured.statistics.shape == (SENDERS, 0) and measured.sizes == {}
    assert not measure_published(signals, SENDERS, References(0.9), SECRET).features.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_what_cannot_be_computed_with_is_not_finite(value: float, dtype: torch.dtype) -> None:
    # The last is finite itself, but its square is not.
    for references in (References(0.9), learned((4, 6, 8))):
        signals, received = pair((4, 6, 8), 56, dtype)
        signals[5, 2, 3] = value
        assert measure(signals, SENDERS, SECRET.project(received), references, SECRET).finite.tolist() == [True, False, True]


def test_a_measurement_without_statistics_is_finite_if_its_means_are() -> None:
    signals = draw((4, 6, 8), 57)
    signals[9, 0, 0] = torch.inf
    for references in (References(0.9), learned((4, 6, 8))):
        assert measure_published(signals, SENDERS, references, SECRET).finite.tolist() == [True, True, False]
