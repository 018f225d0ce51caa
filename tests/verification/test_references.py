from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.verification.consistency import ridge_weights
from lightning_sentinel.verification.projection import unit_directions
from lightning_sentinel.verification.references import Contribution, References
from lightning_sentinel.verification.temporal import Anchor, published_distances, temporal_features

SENDERS, POSITIONS, CHANNELS = 3, 4, 5
SIZES = {"log_spread": 5, "input_input": 16, "input_target": 8}
TOTAL = sum(SIZES.values())


def draw(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype("float32"))


def products(rng: np.random.Generator, senders: int) -> Tensor:
    """Statistics of signals; products of inputs are of full rank, as products are."""
    inputs, targets = draw(rng, senders, 12, 4), draw(rng, senders, 12, 2)
    parts = draw(rng, senders, 5), inputs.transpose(1, 2) @ inputs / 12, inputs.transpose(1, 2) @ targets / 12
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def one_step(
    seed: int, weights: list[list[bool]], positions: int = POSITIONS
) -> tuple[Contribution, list[list[tuple[Tensor, Tensor]]]]:
    """A step of several micro-batches, and what of each sender's should count."""
    rng = np.random.default_rng(seed)
    step = Contribution.like(torch.empty(SENDERS, positions, CHANNELS), torch.empty(SENDERS, TOTAL))
    counted: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(SENDERS)]
    for of_micro_batch in weights:
        means, statistics = draw(rng, SENDERS, positions, CHANNELS), products(rng, SENDERS)
        step.add(means, statistics, torch.tensor(of_micro_batch))
        for sender, counts in enumerate(of_micro_batch):
            if counts:
                counted[sender].append((means[sender], statistics[sender]))
    return step, counted


WEIGHTS = [[True, False, True], [True, True, False]]


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=SENDERS)), ids=str)
def test_the_sum_over_senders_is_a_loop_over_their_signals(chosen: tuple[bool, ...]) -> None:
    step, counted = one_step(0, WEIGHTS)
    signals = [signal for sender, is_chosen in enumerate(chosen) if is_chosen for signal in counted[sender]]
    total = step.of(torch.tensor(chosen))
    assert total.signals.item() == len(signals) and total.positions.count.tolist() == [len(signals)] * POSITIONS
    means = np.sum([mean.double().numpy() for mean, _ in signals], axis=0) if signals else np.zeros((POSITIONS, CHANNELS))
    statistics = np.sum([part.double().numpy() for _, part in signals], axis=0) if signals else np.zeros(TOTAL)
    np.testing.assert_allclose(total.positions.total.numpy(), means, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total.statistics.numpy(), statistics, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2, 2, 0]], ids=str)
def test_signals_are_added_to_the_sums_of_their_places(places: list[int]) -> None:
    rng = np.random.default_rng(3)
    step = Contribution.like(torch.empty(2, SENDERS, POSITIONS, CHANNELS), torch.empty(2, SENDERS, TOTAL))
    counted: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for weights in ([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]):
        means, statistics = draw(rng, SENDERS, POSITIONS, CHANNELS), products(rng, SENDERS)
        step.add(means, statistics, torch.tensor(weights), torch.tensor(places))
        for kind, sender in np.argwhere(weights).tolist():
            counted.setdefault((kind, places[sender]), []).append((means[sender], statistics[sender]))
    for kind, place in np.ndindex(2, SENDERS):
        chosen = torch.zeros(2, SENDERS, dtype=torch.bool)
        chosen[kind, place] = True
        found, signals = step.of(chosen), counted.get((kind, place), [])
        assert found.signals == len(signals) and found.positions.count.tolist() == [len(signals)] * POSITIONS
        means, statistics = torch.zeros(POSITIONS, CHANNELS), torch.zeros(TOTAL)
        for mean, of_signal in signals:
            means, statistics = means + mean, statistics + of_signal
        torch.testing.assert_close(found.positions.total, means)
        torch.testing.assert_close(found.statistics, statistics)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_what_has_no_weight_does_not_poison(value: float) -> None:
    clean, _ = one_step(1, WEIGHTS)
    dirty, _ = one_step(1, WEIGHTS)
    for _ in range(3):
        dirty.add(
            torch.full((SENDERS, POSITIONS, CHANNELS), value), torch.full((SENDERS, TOTAL), value), torch.zeros(SENDERS).bool()
        )
        # A sender that is left out of the sum may hold anything, too.
        dirty.add(
            torch.full((SENDERS, POSITIONS, CHANNELS), value),
            torch.full((SENDERS, TOTAL), value),
            torch.tensor([False, False, True]),
        )
    chosen = torch.tensor([True, True, False])
    assert torch.equal(clean.of(chosen).flat(), dirty.of(chosen).flat())


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_sum_of_flat_vectors_is_the_whole(replicas: int) -> None:
    steps = [one_step(seed, WEIGHTS, positions=2 + seed)[0].of(torch.ones(SENDERS).bool()) for seed in range(replicas)]
    longest = 1 + replicas
    vectors = [step.resized(longest).flat() for step in steps]
    assert {vector.shape for vector in vectors} == {(longest * CHANNELS + longest + TOTAL + 1,)}
    back = Contribution.from_flat(torch.stack(vectors).sum(dim=0), steps[0].resized(longest))
    whole = np.zeros((longest, CHANNELS))
    for step in steps:
        whole[: len(step.positions.total)] += step.positions.total.numpy()
    np.testing.assert_allclose(back.positions.total.numpy(), whole, rtol=1e-5, atol=1e-5)
    statistics = np.sum([step.statistics.numpy() for step in steps], axis=0)
    np.testing.assert_allclose(back.statistics.numpy(), statistics, rtol=1e-5, atol=1e-5)
    assert back.signals.item() == 4 * replicas
    assert back.positions.count.tolist() == [sum(2 + seed > t for seed in range(replicas)) * 4 for t in range(longest)]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_averages_are_plain_at_first_and_decay_later(beta: float) -> None:
    references, plain = References(beta), dict.fromkeys(SIZES)
    everyone = torch.ones(SENDERS).bool()
    for count in range(1, 80):
        step, counted = one_step(count, WEIGHTS)
        references.update(step.of(everyone), SIZES)
        average = np.mean([part.double().numpy() for sender in counted for _, part in sender], axis=0)
        for name, part in zip(SIZES, np.split(average, np.cumsum(list(SIZES.values()))[:-1])):
            weight = max(1 - (beta if name == "log_spread" else 0.98), 1 / count)
            plain[name] = part if plain[name] is None else (1 - weight) * plain[name] + weight * part
    assert references.updates == 79
    for name, expected in plain.items():
        np.testing.assert_allclose(references.statistics[name].numpy(), expected, rtol=1e-3, atol=1e-4)
    gram = plain["input_input"].reshape(4, 4)
    solved = np.linalg.solve(gram + 1e-3 * np.diag(gram).mean() * np.eye(4), plain["input_target"].reshape(4, 2))
    np.testing.assert_allclose(references.weights.numpy(), solved, rtol=1e-3, atol=1e-4)


def test_without_products_there_are_no_weights() -> None:
    references = References(0.9)
    means, statistics = torch.ones(1, POSITIONS, CHANNELS), torch.ones(1, 5)
    step = Contribution.like(means, statistics)
    step.add(means, statistics, torch.tensor([True]))
    references.update(step.of(torch.tensor([True])), {"log_spread": 5})
    assert references.weights is None and references.statistics.keys() == {"log_spread"}


def test_a_step_without_statistics_teaches_the_momentum_alone() -> None:
    references, means = References(0.9), torch.ones(1, POSITIONS, CHANNELS)
    step = Contribution.like(means, torch.empty(1, 0))
    step.add(means, torch.empty(1, 0), torch.tensor([True]))
    references.update(step.of(torch.tensor([True])), {})
    assert torch.equal(references.momentum.value, means[0]) and references.statistics == {}


@pytest.mark.parametrize("earlier", [0, 5])
def test_a_sum_over_no_signals_changes_nothing(earlier: int) -> None:
    references, nobody = References(0.9), torch.zeros(SENDERS).bool()
    for seed in range(earlier):
        references.update(one_step(seed, WEIGHTS)[0].of(~nobody), SIZES)
    before = {name: value.clone() for name, value in references.statistics.items()}
    references.update(one_step(99, WEIGHTS)[0].of(nobody), SIZES)
    assert int(references.updates) == earlier
    for name, value in before.items():
        torch.testing.assert_close(references.statistics[name], value, rtol=0, atol=0)
    if not before:
        references.update(one_step(0, WEIGHTS)[0].of(~nobody), SIZES)
        expected = one_step(0, WEIGHTS)[0].of(~nobody)
        assert torch.equal(references.statistics["log_spread"], (expected.statistics / expected.signals)[:5])


@pytest.mark.parametrize("steps", [0, 1, 20])
def test_saved_and_loaded_references_go_on_identically(steps: int) -> None:
    original, loaded, everyone = References(0.8), References(0.8), torch.ones(SENDERS).bool()
    for seed in range(steps):
        original.update(one_step(seed, WEIGHTS, 2 + seed % 3)[0].of(everyone), SIZES)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(steps, steps + 4):
        if original.weights is None:
            assert loaded.weights is None
        else:
            assert torch.equal(original.weights, loaded.weights)
        assert original.state_dict().keys() == loaded.state_dict().keys()
        for name, value in original.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        for references in (original, loaded):
            references.update(one_step(seed, WEIGHTS)[0].of(everyone), SIZES)


def test_weights_follow_from_the_averages() -> None:
    references, everyone = References(0.8), torch.ones(SENDERS).bool()
    for seed in range(3):
        references.update(one_step(seed, WEIGHTS)[0].of(everyone), SIZES)
        assert torch.equal(references.weights, ridge_weights(references.statistics))


DIRECTIONS = unit_directions(CHANNELS, 3, seed=0)


def assert_anchored(references: References, positions: int) -> None:
    """Signals of so many positions are compared with the momentum as if nothing had been prepared."""
    means, momentum = torch.randn(2, positions, CHANNELS, generator=torch.Generator().manual_seed(7)), references.momentum.value
    shared = min(positions, len(momentum))
    anchor = references.anchor(positions, DIRECTIONS)
    for measure in (published_distances, temporal_features):
        afresh = measure(means[:, :shared].clone(), Anchor.of(momentum[:shared].clone(), DIRECTIONS))
        assert torch.equal(measure(means, anchor), afresh)
    off = means[:, :shared] - momentum[:shared]
    expected = off.norm(dim=(1, 2)) / momentum[:shared].norm()
    torch.testing.assert_close(published_distances(means, anchor)[:, 1], expected)


def test_there_is_nothing_to_compare_with_before_the_first_step() -> None:
    assert References(0.9).anchor(POSITIONS, DIRECTIONS) is None


def test_an_anchor_fits_the_length_of_signals_and_is_kept_while_it_does() -> None:
    references = References(0.9)
    references.update(one_step(0, WEIGHTS)[0].of(torch.ones(SENDERS).bool()), SIZES)
    for positions in (POSITIONS, 1, POSITIONS - 1, POSITIONS, POSITIONS + 3, POSITIONS):
        assert_anchored(references, positions)
        assert references.anchor(positions, DIRECTIONS) is references.anchor(positions, DIRECTIONS)
    # What is longer than the momentum is compared with all of it.
    assert references.anchor(POSITIONS + 3, DIRECTIONS) is references.anchor(POSITIONS, DIRECTIONS)


def test_an_anchor_follows_the_momentum() -> None:
    references, other = References(0.5), References(0.5)
    for seed in range(3):
        references.update(one_step(seed, WEIGHTS, POSITIONS + seed)[0].of(torch.ones(SENDERS).bool()), SIZES)
        for positions in (POSITIONS, POSITIONS + 5):
            assert_anchored(references, positions)
    other.update(one_step(9, WEIGHTS)[0].of(torch.ones(SENDERS).bool()), SIZES)
    assert_anchored(other, POSITIONS)
    other.load_state_dict(references.state_dict())
    assert_anchored(other, POSITIONS)
    assert_anchored(other, POSITIONS + 5)
