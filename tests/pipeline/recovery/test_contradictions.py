"""Who is left out of a step in which workers contradict each other."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.recovery.contradictions import left_out

BEFORE, LIAR, BEHIND = Worker(0, 0), Worker(1, 0), Worker(2, 0)


def contradicted(pairs: list[tuple[Worker, Worker]]) -> dict[Worker, set[Worker]]:
    everyone = {worker for pair in pairs for worker in pair}
    return {worker: {other for pair in pairs if worker in pair for other in pair if other != worker} for worker in everyone}


def test_who_contradicts_both_its_neighbours_is_left_out_and_they_are_not() -> None:
    pairs = [(BEFORE, LIAR), (BEHIND, LIAR), (LIAR, BEFORE), (LIAR, BEHIND)]
    assert left_out(pairs, contradicted(pairs)) == {LIAR}


def test_of_two_that_contradict_each_other_in_both_directions_one_stays() -> None:
    pairs = [(BEFORE, LIAR), (LIAR, BEFORE)]
    assert left_out(pairs, contradicted(pairs)) == {BEFORE}
    assert left_out(pairs, contradicted([*pairs, (LIAR, Worker(0, 1))])) == {LIAR}, "who has contradicted more so far"


def test_of_one_message_its_sender_is() -> None:
    assert left_out([(LIAR, BEFORE)], contradicted([(LIAR, BEFORE)])) == {LIAR}


WORKERS = [Worker(stage, replica) for stage in range(3) for replica in range(3)]
PAIRS = [pair for pair in combinations(WORKERS, 2) if pair[0].stage + 1 == pair[1].stage]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(pairs=st.lists(st.sampled_from(PAIRS), unique=True))
def test_one_of_each_pair_is_in_whatever_order_they_come(pairs: list[tuple[Worker, Worker]]) -> None:
    chosen = left_out(pairs, contradicted(pairs))
    assert all(chosen.intersection(pair) for pair in pairs)
    assert left_out(reversed(pairs), contradicted(pairs)) == chosen
