from __future__ import annotations

import pytest
import torch

from lightning_sentinel.attacks import Adversary, Collude, Delay, Intermittent, Scale, get, resolve
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker
from tests.attacks.tools import WORKER, context, signal_of

MESH = Mesh(stages=4, replicas=8)
LIARS = [Worker(1, 0), Worker(1, 1), Worker(2, 3)]
ACTIVATION, GRADIENT = Direction.ACTIVATION, Direction.GRADIENT


def strikes(adversary, worker, direction=ACTIVATION, steps=40, micro_batch=0):
    signal = torch.ones(2)
    return [not torch.equal(adversary.tamper(signal, worker, direction, step, micro_batch), signal) for step in range(steps)]


class TestIntermittent:
    @pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
    def test_strikes_in_that_share_of_the_steps(self, probability):
        adversary = Adversary(Intermittent("zeros", probability), MESH, workers=[WORKER])
        struck = strikes(adversary, WORKER, steps=1000)
        assert sum(struck) / 1000 == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 1000) ** 0.5)

    def test_one_draw_for_all_of_a_step(self):
        adversary = Adversary(Intermittent("zeros"), MESH, workers=[WORKER])
        first = strikes(adversary, WORKER)
        assert strikes(adversary, WORKER, micro_batch=3) == first
        assert strikes(adversary, WORKER, GRADIENT) == first
        assert strikes(adversary, WORKER) == first

    def test_seeds_and_workers_draw_apart(self):
        adversaries = [Adversary(Intermittent("zeros"), MESH, workers=LIARS, seed=seed) for seed in (0, 1)]
        rows = {tuple(strikes(adversary, worker)) for adversary in adversaries for worker in LIARS}
        assert len(rows) == 6

    def test_the_inner_attack_learns_in_quiet_steps(self):
        adversary = Adversary(Intermittent(Delay(1), 0.5), MESH, workers=[WORKER], start_step=2)
        sent = [adversary.tamper(torch.full((1,), float(step)), WORKER, ACTIVATION, step, 0).item() for step in range(40)]
        assert {step - value for step, value in enumerate(sent[2:], start=2)} == {0.0, 1.0}
        assert sent[:2] == [0.0, 1.0]


class TestCollude:
    @pytest.mark.parametrize("inner", ["random", "sign", "noise", "permute", "local", "add_noise"])
    def test_workers_draw_the_same(self, inner):
        signal = signal_of((8, 16))

        def sent(attack, seed=0, step=0, micro_batch=0, direction=ACTIVATION):
            adversary = Adversary(attack, MESH, workers=LIARS, seed=seed)
            return [adversary.tamper(signal, worker, direction, step, micro_batch) for worker in LIARS]

        first, *others = sent(Collude(inner))
        assert all(torch.equal(first, other) for other in others)
        apart, *others = sent(inner)
        assert not any(torch.equal(apart, other) for other in others)
        for where in ({"seed": 1}, {"step": 1}, {"micro_batch": 1}, {"direction": GRADIENT}):
            assert not torch.equal(sent(Collude(inner), **where)[0], first)

    def test_they_strike_in_the_same_steps(self):
        adversary = Adversary(Collude(Intermittent("zeros")), MESH, workers=LIARS)
        rows = {tuple(strikes(adversary, worker)) for worker in LIARS}
        assert len(rows) == 1
        assert set(rows.pop()) == {True, False}


class TestState:
    @pytest.mark.parametrize("inner", ["delay", "swap", "momentum_noise", "surrogate"])
    @pytest.mark.parametrize("wrap", [Collude, Intermittent, lambda attack: Collude(Intermittent(Collude(attack)))])
    def test_every_worker_has_its_own(self, inner, wrap):
        attack = get(inner)
        adversary = Adversary(wrap(attack), MESH, workers=LIARS)

        def innermost(found):
            while isinstance(found, (Collude, Intermittent)):
                found = found.inner
            return found

        found = [innermost(adversary.attack_of(worker)) for worker in LIARS]
        assert all(one == attack for one in found)
        assert len({id(one) for one in [attack, *found]}) == 4
        for worker in LIARS[:1]:
            adversary.tamper(torch.ones(2, 3), worker, ACTIVATION, 0, 0, torch.ones(2, 3))
        states = [[value for name, value in vars(one).items() if name.startswith("_") and value] for one in found]
        assert states[0]
        assert not any(states[1:])

    def test_a_callable_inside_is_shared(self):
        def mine(signal, context):
            return -signal

        adversary = Adversary(Collude(Intermittent(mine, 1.0)), MESH, workers=LIARS)
        assert all(adversary.attack_of(worker).inner.inner is mine for worker in LIARS)

    def test_observed_through_wrappers(self):
        adversary = Adversary(Collude(Intermittent(Delay(2), 1.0)), MESH, workers=[WORKER], start_step=3)
        sent = [adversary.tamper(torch.full((1,), float(step)), WORKER, ACTIVATION, step, 0).item() for step in range(6)]
        assert sent == [0.0, 1.0, 2.0, 1.0, 2.0, 3.0]

    @pytest.mark.parametrize("wrapper", [Collude("zeros"), Intermittent("zeros", 1.0)], ids=repr)
    def test_inner_attacks_need_not_observe(self, wrapper):
        wrapper.observe(torch.ones(2), context())
        assert wrapper(torch.ones(2), context()).tolist() == [0.0, 0.0]


class TestSpecs:
    def test_by_mapping(self):
        attack = resolve({"name": "collude", "attack": {"name": "intermittent", "attack": {"name": "scale", "factor": 3.0}}})
        assert attack == Collude(Intermittent(Scale(3.0), 0.5))

    def test_an_inner_attack_that_does_not_exist(self):
        with pytest.raises(ConfigurationError, match=r"no attack 'scal'.*Did you mean 'scale'"):
            Collude("scal")

    def test_a_probability_that_cannot_work(self):
        with pytest.raises(ConfigurationError, match=r"probability=0\) cannot work: probability must be a number above 0"):
            Intermittent("zeros", probability=0)

    def test_an_inner_attack_that_returns_the_wrong_thing_is_named(self):
        def halve(signal, context):
            return signal[:1]

        with pytest.raises(ConfigurationError, match=r"halve.*shape \(1,\).*shape \(2,\)"):
            Adversary(Collude(halve), MESH, workers=[WORKER]).tamper(torch.ones(2), WORKER, ACTIVATION, 0, 0)
