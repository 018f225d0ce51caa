from __future__ import annotations

import pytest
import torch

from lightning_sentinel.attacks import Adversary, Permute, Swap
from lightning_sentinel.mesh import Direction, Mesh, Worker
from tests.attacks.tools import SHAPES, WORKER, context, signal_of


class TestPermute:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_no_sample_keeps_its_place(self, shape):
        signal = signal_of(shape)
        for step in range(20):
            sent = Permute()(signal, context(step=step))
            places = [[torch.equal(one, other) for other in signal].index(True) for one in sent]
            assert sorted(places) == list(range(len(signal)))
            assert all(place != index for index, place in enumerate(places))

    def test_is_one_cycle_and_all_of_them_come_up(self):
        seen = set()
        for step in range(200):
            sent = Permute()(torch.arange(4), context(step=step)).tolist()
            cycle, at = [], 0
            for _ in range(4):
                cycle.append(at)
                at = sent[at]
            assert at == 0
            assert sorted(cycle) == [0, 1, 2, 3]
            seen.add(tuple(sent))
        assert len(seen) == 6

    @pytest.mark.parametrize(("shape", "axis"), [((1, 7, 3), 1), ((1, 3, 7, 2), 2), ((1, 3, 1, 7), 3)], ids=str)
    def test_with_one_sample_it_permutes_positions(self, shape, axis):
        signal = torch.arange(7.0).reshape([-1 if index == axis else 1 for index in range(len(shape))]).expand(shape)
        sent = Permute()(signal, context())
        assert torch.equal(sent.sort(dim=axis).values, signal)
        assert not (sent == signal).any()

    def test_one_sample_of_features_stays(self):
        signal = signal_of((1, 6))
        assert torch.equal(Permute()(signal, context()), signal)


class TestSwap:
    def send(self, attack, step, micro_batch, shape=(2, 3), **where):
        value = 10.0 * step + micro_batch
        return attack(torch.full(shape, value), context(step=step, micro_batch=micro_batch, **where)).flatten()[0].item()

    def test_sends_the_micro_batch_before(self):
        attack = Swap()
        order = [(step, micro_batch) for step in range(3) for micro_batch in range(3)]
        sent = [self.send(attack, *when) for when in order]
        assert sent == [0.0, *(10.0 * step + micro_batch for step, micro_batch in order[:-1])]

    def test_workers_and_directions_are_apart(self):
        attack = Swap()
        places = [{}, {"worker": Worker(1, 1)}, {"worker": Worker(2, 0)}, {"direction": Direction.GRADIENT}]
        for index, where in enumerate(places):
            attack(torch.full((1, 1), 100.0 + index), context(**where))
        for index, where in enumerate(places):
            assert self.send(attack, 0, 1, shape=(1, 1), **where) == 100.0 + index

    def test_a_step_done_again_in_part_and_in_whole(self):
        attack = Swap()
        for when in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            self.send(attack, *when)
        assert [self.send(attack, *when) for when in [(1, 1), (1, 0), (1, 1), (2, 0)]] == [10.0, 1.0, 10.0, 11.0]

    def test_memory_is_bounded(self):
        attack = Swap()
        for step in range(10):
            for micro_batch in range(3):
                self.send(attack, step, micro_batch)
                assert len(attack._history) <= 4

    def test_honest_where_the_shape_changed(self):
        attack = Swap()
        self.send(attack, 0, 0)
        assert self.send(attack, 0, 1, shape=(4, 3)) == 1.0

    def test_history_is_a_copy(self):
        attack, buffer = Swap(), torch.zeros(2, 3)
        attack(buffer, context())
        buffer.fill_(7.0)
        assert attack(buffer, context(micro_batch=1)).eq(0).all()

    def test_starts_at_full_strength(self):
        adversary = Adversary("swap", Mesh(3, 4), workers=[WORKER], start_step=1)
        sent = [adversary.tamper(torch.full((1,), 5.0 + step), WORKER, Direction.GRADIENT, step, 0).item() for step in range(3)]
        assert sent == [5.0, 5.0, 6.0]
