from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_sentinel.attacks import Adversary, FlipResidual, MomentumNoise, Surrogate
from lightning_sentinel.attacks.memory import DecayedSums
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker
from tests.attacks.tools import SHAPES, WORKER, by_channel, context, signal_of


class TestDecayedSums:
    def test_the_present_step_is_kept_apart(self):
        memory = DecayedSums(0.5)
        seen = []
        for step, micro_batch, value in [(0, 0, 1.0), (0, 1, 2.0), (1, 0, 4.0), (4, 0, 8.0), (5, 0, 0.0)]:
            seen.append(memory.before(step, None))
            memory.add(micro_batch, (torch.tensor(value),))
        assert [None if one is None else one[0].item() for one in seen] == [None, None, 3.0, 5.5, 10.75]

    def test_what_is_done_again_is_replaced(self):
        memory = DecayedSums(0.5)
        for value in (100.0, 3.0):
            memory.before(0, None)
            memory.add(0, (torch.tensor(value),))
        assert memory.before(1, None)[0].item() == 3.0

    @pytest.mark.parametrize(("step", "kind"), [(0, "a"), (2, "b")], ids=["an earlier step", "another kind"])
    def test_forgets(self, step, kind):
        memory = DecayedSums(0.5)
        for earlier in range(2):
            memory.before(earlier, "a")
            memory.add(0, (torch.ones(()),))
        assert memory.before(step, kind) is None

    def test_an_overflow_counts_as_zero(self):
        memory = DecayedSums(0.5)
        for step, value in enumerate((4.0, float("nan"), 1.0)):
            memory.before(step, None)
            memory.add(0, (torch.tensor(value), torch.tensor(1.0)))
        assert [one.item() for one in memory.before(3, None)] == [2.0, 1.25]


class TestMomentumNoise:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_sends_the_average_of_the_batch_means(self, shape):
        attack, beta = MomentumNoise(beta=0.7), 0.7
        # All samples of a micro-batch alike: there is no noise.
        batches = [
            [signal_of(shape, torch.float64, seed=10 * step + part)[:1].expand(shape) for part in (0, 1)] for step in range(5)
        ]
        for step, parts in enumerate(batches):
            sent = [attack(signal, context(step=step, micro_batch=index)) for index, signal in enumerate(parts)]
            if step == 0:
                assert all(torch.equal(one, honest) for one, honest in zip(sent, parts))
                continue
            weights = np.array([beta ** (step - 1 - earlier) for earlier in range(step)])
            means = np.array([torch.cat(earlier).mean(0).numpy() for earlier in batches[:step]])
            expected = np.tensordot(weights, means, 1) / weights.sum()
            for one in sent:
                np.testing.assert_allclose(one.numpy(), np.broadcast_to(expected, shape), rtol=1e-9, atol=1e-12)

    def test_samples_count_alike(self):
        attack = MomentumNoise()
        attack(torch.full((3, 1), 1.0), context(micro_batch=0))
        attack(torch.full((1, 1), 5.0), context(micro_batch=1))
        assert attack(torch.zeros(2, 1), context(step=1)).tolist() == [[2.0], [2.0]]

    @pytest.mark.parametrize("shape", [(4000, 6), (400, 10, 6), (400, 6, 4, 4)], ids=str)
    def test_the_noise_is_that_of_the_signal_around_its_mean(self, shape):
        attack = MomentumNoise()
        axis = 1 if len(shape) == 4 else -1
        spread = torch.arange(1.0, 7.0)
        noise = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).movedim(axis, -1) * spread).movedim(-1, axis)
        signal = 100 * signal_of(shape[1:]) + noise
        attack.observe(signal, context())
        sent = attack(signal, context(step=1))
        around = by_channel(sent - signal.mean(0))
        np.testing.assert_allclose(around.std(0), spread, rtol=0.05)
        np.testing.assert_array_less(np.abs(around.mean(0)), 0.1 * spread.numpy())

    def test_starts_at_full_strength(self):
        adversary = Adversary("momentum_noise", Mesh(3, 4), workers=[WORKER], start_step=1)
        sent = [adversary.tamper(torch.full((1, 1), 5.0 + step), WORKER, Direction.GRADIENT, step, 0).item() for step in range(2)]
        assert sent == [5.0, 5.0]

    def test_an_overflow_spoils_nothing(self):
        attack = MomentumNoise()
        attack(torch.full((2, 1), float("inf")), context())
        assert attack(torch.full((2, 1), 3.0), context(step=1)).tolist() == [[3.0], [3.0]]
        assert attack(torch.full((2, 1), 4.0), context(step=2)).tolist() == [[3.0], [3.0]]

    def test_keeps_no_graph(self):
        attack = MomentumNoise()
        attack.observe(torch.ones(2, 3, requires_grad=True), context())
        assert not attack(torch.ones(2, 3), context(step=1)).requires_grad


def stage_of(received, seed=5):
    """A stage that is not linear, with another number of channels."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(6, 6, generator=generator, dtype=received.dtype), torch.randn(6, 4, generator=generator)
    axis = 1 if received.ndim == 4 else -1
    hidden = received.movedim(axis, -1) @ first
    return ((hidden + hidden.tanh()) @ second.to(received.dtype) + 3).movedim(-1, axis)


def ridge_in_numpy(pairs, weights, ridge):
    """``W`` (with the constant last) that solves the penalised problem as one least-squares problem."""
    weights = np.concatenate([np.full(len(x), weight) for (x, _), weight in zip(pairs, weights)])
    x, y = np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])
    weights /= weights.sum()
    penalty = ridge * (weights @ x**2).mean()
    root = np.sqrt(weights)[:, None]
    rows = np.concatenate([root * np.c_[x, np.ones(len(x))], np.c_[np.sqrt(penalty) * np.eye(6), np.zeros(6)]])
    return np.linalg.lstsq(rows, np.concatenate([root * y, np.zeros((6, y.shape[1]))]), rcond=None)[0]


class TestSurrogate:
    @pytest.mark.parametrize("shape", [(40, 6), (4, 10, 6), (3, 6, 4, 4)], ids=str)
    @pytest.mark.parametrize("observed", [0, 2])
    @pytest.mark.parametrize("ridge", [1e-6, 0.3])
    def test_is_the_ridge_regression_of_the_steps_before(self, shape, observed, ridge):
        attack, decay, pairs = Surrogate(decay=0.8, ridge=ridge), 0.8, []
        for step in range(4):
            steps = []
            for micro_batch in range(2):
                received = signal_of(shape, torch.float64, seed=10 * step + micro_batch)
                signal = stage_of(received)
                here = context(step=step, micro_batch=micro_batch, received=received)
                x = by_channel(received)
                y = signal.movedim(1 if signal.ndim == 4 else -1, -1).reshape(-1, 4).numpy()
                steps.append((x, y))
                if step < observed:
                    attack.observe(signal, here)
                    continue
                sent = attack(signal, here)
                if step == 0:
                    assert torch.equal(sent, signal)
                    continue
                weights = [decay ** (step - 1 - index // 2) for index in range(len(pairs))]
                expected = np.c_[x, np.ones(len(x))] @ ridge_in_numpy(pairs, weights, ridge)
                got = sent.movedim(1 if sent.ndim == 4 else -1, -1).reshape(-1, 4).numpy()
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
            pairs += steps

    def test_noise_has_the_size_of_the_residual(self):
        received = signal_of((400, 10, 6), seed=1)
        spread = torch.tensor([0.1, 1.0, 5.0, 2.0])
        signal = stage_of(received) + torch.randn(400, 10, 4, generator=torch.Generator().manual_seed(2)) * spread
        sent = {}
        for noise in (False, True):
            attack = Surrogate(noise=noise)
            attack.observe(signal, context(received=received))
            sent[noise] = attack(signal, context(step=1, received=received))
        residual = (signal - sent[False]).reshape(-1, 4).std(0)
        added = (sent[True] - sent[False]).reshape(-1, 4)
        torch.testing.assert_close(added.std(0), residual, rtol=0.05, atol=0)
        assert (added.mean(0).abs() < 0.1 * residual).all()

    @pytest.mark.parametrize(
        "received",
        [None, torch.ones(4, 5, 6), torch.ones(4, 7, 6, dtype=torch.long), torch.ones(4, 7)],
        ids=["nothing", "fewer positions", "integers", "no channels"],
    )
    def test_honest_where_nothing_fits(self, received):
        attack, signal = Surrogate(noise=True), signal_of((4, 7, 6))
        for step in range(3):
            attack.observe(signal, context(step=step, received=received))
            assert torch.equal(attack(signal, context(step=step, received=received)), signal)

    @pytest.mark.parametrize("scale", [0.0, 1e-9, 1e6], ids=str)
    def test_any_scale_of_input(self, scale):
        attack = Surrogate()
        for step in range(3):
            received = scale * signal_of((4, 7, 6), seed=step)
            signal = 2 * received
            sent = attack(signal, context(step=step, received=received))
        torch.testing.assert_close(sent, signal, rtol=0.05, atol=0.05 * scale)

    def test_an_overflow_spoils_nothing(self):
        attack, received = Surrogate(), signal_of((40, 6))
        attack(torch.full((40, 6), float("nan")), context(received=received))
        assert torch.equal(attack(2 * received, context(step=1, received=received)), 2 * received)
        sent = attack(2 * received, context(step=2, received=received))
        torch.testing.assert_close(sent, 2 * received, rtol=0.05, atol=0.05)

    def test_solves_once_a_step(self, monkeypatch):
        solved = []
        solve = torch.linalg.cholesky_ex
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: solved.append(1) or solve(matrix))
        attack = Surrogate()
        for step in range(3):
            for micro_batch in range(4):
                received = signal_of((4, 6), seed=micro_batch)
                attack(received, context(step=step, micro_batch=micro_batch, received=received))
        assert len(solved) == 2

    def test_workers_and_directions_are_apart(self):
        attack = Surrogate()
        places = [{}, {"worker": Worker(1, 1)}, {"direction": Direction.GRADIENT}]
        for factor, where in enumerate(places, start=1):
            received = signal_of((40, 6))
            attack.observe(factor * received, context(received=received, **where))
        for factor, where in enumerate(places, start=1):
            sent = attack(torch.zeros(40, 6), context(step=1, received=received, **where))
            torch.testing.assert_close(sent, factor * received, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MomentumNoise(beta=1), r"MomentumNoise\(beta=1\) cannot work: beta must be a number of at least 0 and below 1"),
        (lambda: Surrogate(noise=1), r"Surrogate\(noise=1\) cannot work: noise must be true or false"),
        (lambda: Surrogate(decay=-0.1), r"Surrogate\(decay=-0.1\)"),
        (lambda: Surrogate(ridge=0), r"Surrogate\(ridge=0\) cannot work: ridge must be a number above 0"),
        (lambda: FlipResidual(strength="1e0"), r"FlipResidual\(strength='1e0'\) \(str\)"),
    ],
)
def test_strengths_that_cannot_work(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
