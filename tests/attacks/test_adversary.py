from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

from lightning_sentinel.attacks import Adversary, AttackContext, Delay, RandomValue, Scale, Zeros
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker

MESH = Mesh(stages=4, replicas=8)
LIAR = Worker(1, 0)
ACTIVATION, GRADIENT = Direction.ACTIVATION, Direction.GRADIENT


def one_liar(attack, **options):
    return Adversary(attack, MESH, workers=[LIAR], **options)


class TestWorkers:
    def test_named(self):
        workers = [Worker(0, 1), Worker(3, 7)]
        assert Adversary("zeros", MESH, workers=workers).workers == frozenset(workers)

    def test_nobody_may_be_named(self):
        assert Adversary("zeros", MESH, workers=[]).workers == frozenset()

    @pytest.mark.parametrize(("fraction", "count"), [(0.25, 2), (0.375, 3), (0.3, 2), (0.01, 1)], ids=lambda value: f"{value}")
    def test_drawn_in_every_middle_stage(self, fraction, count):
        workers = Adversary("zeros", MESH, fraction=fraction).workers
        assert Counter(worker.stage for worker in workers) == {1: count, 2: count}
        assert all(worker in MESH for worker in workers)

    def test_the_seed_decides_the_draw(self):
        draws = [Adversary("zeros", MESH, fraction=0.375, seed=seed).workers for seed in (0, 0, 1, 2, 3)]
        assert draws[0] == draws[1]
        assert len(set(draws)) == 4

    def test_stages_draw_apart(self):
        drawn = Adversary("zeros", Mesh(10, 16), fraction=0.25, seed=3).workers
        by_stage = {frozenset(worker.replica for worker in drawn if worker.stage == stage) for stage in range(1, 9)}
        assert len(by_stage) > 1

    @pytest.mark.parametrize("options", [{}, {"workers": [LIAR], "fraction": 0.25}], ids=["neither", "both"])
    def test_exactly_one_of_workers_and_fraction(self, options):
        with pytest.raises(ConfigurationError, match="Give exactly one of them"):
            Adversary("zeros", MESH, **options)

    def test_outside_the_mesh(self):
        with pytest.raises(ConfigurationError, match=r"worker \(stage 4, replica 0\) is not in the mesh.*0\.\.3.*0\.\.7"):
            Adversary("zeros", MESH, workers=[Worker(4, 0)])

    def test_no_worker_at_all(self):
        with pytest.raises(ConfigurationError, match=r"\(1, 0\), which is no worker. Write Worker"):
            Adversary("zeros", MESH, workers=[(1, 0)])

    @pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1])
    def test_fraction_out_of_range(self, fraction):
        with pytest.raises(ConfigurationError, match=f"fraction={fraction} cannot work.*between 0 and 1"):
            Adversary("zeros", MESH, fraction=fraction)

    @pytest.mark.parametrize("stages", [1, 2])
    def test_no_middle_stage(self, stages):
        with pytest.raises(ConfigurationError, match=rf"{stages} stages has none. Name the workers instead"):
            Adversary("zeros", Mesh(stages, 4), fraction=0.25)

    @pytest.mark.parametrize("replicas", [5, 6, 8])
    def test_warns_of_a_majority(self, replicas):
        workers = [Worker(2, replica) for replica in range(replicas)] + [Worker(1, 0)]
        with pytest.warns(UserWarning, match=rf"stage 2 \({replicas} of 8 replicas\).*fewer than half") as caught:
            Adversary("zeros", MESH, workers=workers)
        assert "stage 1" not in str(caught[0].message)
        assert caught[0].filename == __file__

    def test_is_silent_up_to_a_half(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Adversary("zeros", MESH, workers=[Worker(2, replica) for replica in range(4)])
            Adversary("zeros", MESH, fraction=0.375)


class TestAttacks:
    def test_several_are_drawn_from(self):
        specs = ["zeros", {"name": "scale", "factor": 2.0}, RandomValue(3.0)]
        mesh = Mesh(10, 16)
        adversary = Adversary(specs, mesh, fraction=0.375, seed=1)
        dealt = {worker: repr(adversary.attack_of(worker)) for worker in adversary.workers}
        assert set(dealt.values()) == {"Zeros()", "Scale(factor=2.0)", "RandomValue(std=3.0)"}
        again = Adversary(specs, mesh, workers=sorted(adversary.workers, reverse=True), seed=1)
        assert {worker: repr(again.attack_of(worker)) for worker in again.workers} == dealt
        other = Adversary(specs, mesh, workers=adversary.workers, seed=2)
        assert {worker: repr(other.attack_of(worker)) for worker in other.workers} != dealt

    def test_library_attacks_have_a_state_of_their_own(self):
        delay = Delay(1)
        adversary = Adversary(delay, MESH, workers=[Worker(1, 0), Worker(1, 1)])
        first, second = (adversary.attack_of(worker) for worker in sorted(adversary.workers))
        assert first == second == delay
        assert len({id(first), id(second), id(delay)}) == 3
        adversary.tamper(torch.ones(2), Worker(1, 0), ACTIVATION, 0, 0)
        assert not second._histories
        assert not delay._histories

    def test_callables_are_shared(self):
        def mine(signal, context):
            return -signal

        adversary = Adversary(mine, MESH, workers=[Worker(1, 0), Worker(1, 1)])
        assert all(adversary.attack_of(worker) is mine for worker in adversary.workers)

    def test_none_at_all(self):
        with pytest.raises(ConfigurationError, match=r"attacks=\[\] holds no attack"):
            one_liar([])

    def test_the_honest_have_none(self):
        with pytest.raises(ConfigurationError, match=r"replica 5\) is honest.*worker \(stage 1, replica 0\)"):
            one_liar("zeros").attack_of(Worker(1, 5))


class TestWhen:
    @pytest.mark.parametrize(
        ("direction", "tampered"),
        [("activation", {ACTIVATION}), ("gradient", {GRADIENT}), ("both", {ACTIVATION, GRADIENT})],
    )
    def test_direction(self, direction, tampered):
        adversary = one_liar("zeros", direction=direction)
        assert {which for which in Direction if adversary.tampers(LIAR, which, 0)} == tampered
        signal = torch.ones(2)
        assert {which for which in Direction if adversary.tamper(signal, LIAR, which, 0, 0) is not signal} == tampered

    def test_start_step(self):
        adversary = one_liar("zeros", start_step=3)
        assert adversary.start_step == 3
        signal = torch.ones(2)
        for step in range(6):
            assert adversary.tampers(LIAR, ACTIVATION, step) == (step >= 3)
            assert (adversary.tamper(signal, LIAR, ACTIVATION, step, 0) is signal) == (step < 3)

    def test_the_honest_send_what_they_have(self):
        signal = torch.ones(2, requires_grad=True)
        adversary = one_liar("zeros")
        assert not adversary.tampers(Worker(1, 1), ACTIVATION, 0)
        assert adversary.tamper(signal, Worker(1, 1), ACTIVATION, 0, 0) is signal

    def test_delay_sees_what_was_sent_before_it_starts(self):
        adversary = one_liar(Delay(2), start_step=3)
        sent = [adversary.tamper(torch.full((1,), float(step)), LIAR, ACTIVATION, step, 0).item() for step in range(6)]
        assert sent == [0.0, 1.0, 2.0, 1.0, 2.0, 3.0]

    def test_before_the_start_the_observed_signal_keeps_its_graph(self):
        signal = torch.ones(2, requires_grad=True)
        assert one_liar(Delay(2), start_step=3).tamper(signal, LIAR, ACTIVATION, 0, 0) is signal

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"start_step": -1}, "start_step=-1"), ({"direction": "forward"}, "direction='forward'.*'both'")],
    )
    def test_arguments_that_cannot_work(self, options, message):
        with pytest.raises(ConfigurationError, match=message):
            one_liar("zeros", **options)


class TestTamper:
    def test_the_attack_sees_where_it_is(self):
        seen = []

        def spy(signal, context):
            seen.append((context, torch.is_grad_enabled(), signal.requires_grad))
            return signal.clone()

        received = torch.zeros(3, requires_grad=True)
        one_liar(spy).tamper(torch.ones(2, requires_grad=True), LIAR, GRADIENT, 5, 2, received)
        [(context, grad_enabled, requires_grad)] = seen
        assert (context.step, context.micro_batch, context.worker, context.direction) == (5, 2, LIAR, GRADIENT)
        assert torch.equal(context.received, received)
        assert not context.received.requires_grad
        assert context.generator.device == torch.device("cpu")
        assert not grad_enabled
        assert not requires_grad

    def test_the_attack_sees_when_the_adversary_starts_and_its_seed(self):
        seen = []

        def spy(signal, context):
            seen.append((context.start_step, context.seed, context.colluding))
            return signal.clone()

        one_liar(spy, start_step=3, seed=8).tamper(torch.ones(2), LIAR, GRADIENT, 5, 2)
        assert seen == [(3, 8, False)]

    def test_anywhere_in_a_pipeline_and_several_in_one(self):
        pipeline = [Worker(stage, 2) for stage in range(MESH.stages)]
        adversary = Adversary("identity", MESH, workers=pipeline)
        signal, received = torch.ones(2, 3), torch.full((2, 3), 7.0)
        for worker in pipeline:
            for direction in Direction:
                assert torch.equal(adversary.tamper(signal, worker, direction, 0, 0), signal)
                assert torch.equal(adversary.tamper(signal, worker, direction, 0, 0, received), received)

    def test_the_result_has_no_graph(self):
        sent = one_liar(Scale(-2.0)).tamper(torch.ones(2, requires_grad=True), LIAR, ACTIVATION, 0, 0)
        assert sent.tolist() == [-2.0, -2.0]
        assert not sent.requires_grad

    def test_works_in_inference_mode(self):
        with torch.inference_mode():
            assert one_liar("zeros").tamper(torch.ones(2), LIAR, ACTIVATION, 0, 0).tolist() == [0.0, 0.0]

    def test_deterministic_by_seed(self):
        def run(seed):
            adversary = one_liar(["random", "sign", "noise"], seed=seed)
            signal = torch.arange(12.0).reshape(4, 3)
            return torch.stack([adversary.tamper(signal, LIAR, ACTIVATION, step, 0) for step in range(3)])

        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))

    def test_workers_draw_different_noise(self):
        adversary = Adversary("random", MESH, workers=[Worker(1, 0), Worker(1, 1)])
        first, second = (adversary.tamper(torch.ones(8), worker, ACTIVATION, 0, 0) for worker in adversary.workers)
        assert not torch.equal(first, second)

    def test_a_wrong_shape(self):
        def halve(signal, context):
            return signal[:1]

        with pytest.raises(ConfigurationError) as error:
            one_liar(halve).tamper(torch.ones(2, 3), LIAR, ACTIVATION, 0, 0)
        text = str(error.value)
        assert "halve" in text
        assert "(1, 3)" in text
        assert "(2, 3)" in text
        assert "Return a tensor" in text

    def test_a_wrong_dtype(self):
        def widen(signal, context):
            return signal.double()

        with pytest.raises(ConfigurationError, match=r"widen.*torch\.float64.*torch\.float32"):
            one_liar(widen).tamper(torch.ones(2), LIAR, ACTIVATION, 0, 0)

    def test_a_wrong_device(self):
        def move(signal, context):
            return signal.to("meta")

        with pytest.raises(ConfigurationError, match=r"move.*on meta.*on cpu"):
            one_liar(move).tamper(torch.ones(2), LIAR, ACTIVATION, 0, 0)

    @pytest.mark.parametrize("sent", [None, [1.0, 1.0], torch.ones(2).numpy()], ids=["None", "list", "array"])
    def test_no_tensor(self, sent):
        with pytest.raises(ConfigurationError, match=f"an object of type {type(sent).__name__} in place of a gradient"):
            one_liar(lambda signal, context: sent).tamper(torch.ones(2), LIAR, GRADIENT, 0, 0)

    def test_in_place(self):
        def overwrite(signal, context):
            return signal.zero_()

        with pytest.raises(ConfigurationError, match=r"overwrite.*changed the honest activation in place.*clone"):
            one_liar(overwrite).tamper(torch.ones(2), LIAR, ACTIVATION, 0, 0)

    def test_nobody_else_draws_from_the_global_generator(self):
        before = torch.get_rng_state()
        one_liar("random").tamper(torch.ones(2), LIAR, ACTIVATION, 0, 0)
        assert torch.equal(before, torch.get_rng_state())


def test_zeros_end_to_end():
    adversary = Adversary("zeros", MESH, fraction=0.375, seed=4)
    for worker in MESH:
        sent = adversary.tamper(torch.ones(3), worker, ACTIVATION, 0, 0)
        assert bool(sent.eq(0).all()) == (worker in adversary.workers)
    assert all(adversary.attack_of(worker) == Zeros() for worker in adversary.workers)


class TestContext:
    def test_seeds_for_draws_that_signals_share(self):
        def seed_for(worker=LIAR, seed=0, **where):
            return AttackContext.seeded(seed, worker, ACTIVATION, **where).seed_for("pause", 3)

        assert seed_for() == seed_for(step=4) == seed_for(micro_batch=2)
        assert len({seed_for(), seed_for(Worker(1, 1)), seed_for(Worker(2, 0)), seed_for(seed=1)}) == 4

    def test_together_leaves_the_context_as_it_is(self):
        context = AttackContext.seeded(0, LIAR, ACTIVATION, step=2, start_step=1)
        shared = context.together()
        assert (shared.step, shared.start_step, shared.worker, shared.seed) == (2, 1, LIAR, 0)
        assert (context.colluding, shared.colluding, shared.together().colluding) == (False, True, True)
        first, second = (torch.rand(4, generator=one.generator) for one in (shared, shared.together()))
        assert torch.equal(first, second)
